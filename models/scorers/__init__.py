"""Pretrained networks that score images, each with the preprocessing of its published protocol.

A feature network takes a list of uint8 RGB images [3, H, W], on any device and of any sizes, and returns float32
features [B, D]. A text-image score takes such a list and as many prompts, and returns float32 scores [B]. Both run as
one batch, frozen and in inference mode, on the device they were made for. Weights are local files; nothing is
downloaded.
"""
