"""The container formats of images, read without decoding a pixel: one module per format."""
