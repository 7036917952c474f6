"""The demo: a trained network and an endless supply of labelled images, without a network or a data package.

`images` draws the images, `net` holds the network and loads its checkpoint, `train` is the script that
made the checkpoint `shapes.safetensors`.
"""
