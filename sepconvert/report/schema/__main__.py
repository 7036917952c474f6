"""Write the JSON Schemas to a folder: `python -m sepconvert.report.schema docs/schemas`."""

import sys
from pathlib import Path

from sepconvert.report.schema.published import write_schemas

if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
