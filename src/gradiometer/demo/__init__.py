"""Two small models on real data that need no download, to see the instruments at work.

`gradiometer.demo.digits` trains a convolutional network on scanned digits in under a minute;
`gradiometer.demo.characters` trains a causal transformer on the text of Python's help topics.
Both are plain `LightningModule` classes that know nothing of this package, as a user's would be.
"""
