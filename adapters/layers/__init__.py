"""A transformer layer's own weights, run by faster code than that of `transformers`.

Only `adapters.backbone` imports these modules; they know rows and positions, but no adapters. Start
with `bert.BertLayer`, which chooses the code for a device.
"""
