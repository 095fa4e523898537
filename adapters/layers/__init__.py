"""A transformer layer's own weights, run by faster code than that of `transformers`.

`adapters.backbone` runs them. They deal with rows and positions, never with adapters. Start with
`bert.BertLayer`, which chooses the code for a device.
"""
