"""Types of the JSON documents: report.json, plan.json, and the profiles of `sepconvert profile`.

The JSON Schemas in docs/schemas are made from them by `python -m sepconvert.report.schema docs/schemas`.
A reader may turn a document into its type, which checks it:
`msgspec.json.decode(Path("report.json").read_bytes(), type=ReportDocument)`. Keys that a type does not have
are allowed, as later versions may add some.
"""
