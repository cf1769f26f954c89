"""The micro world: generated 64x64 clips with captions, a text path without weights, and measures from pixels.

`names.py` has the words, `world.py` makes clips, `text.py` turns captions into conditioning, `observe.py` and
`metrics.py` judge a clip against its caption.
"""
