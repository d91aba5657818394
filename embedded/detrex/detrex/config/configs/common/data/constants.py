"""Means and standard deviations of ImageNet's pixels, 0 to 255."""

constants = {
    "imagenet_rgb256_mean": [123.675, 116.28, 103.53],
    "imagenet_rgb256_std": [58.395, 57.12, 57.375],
    "imagenet_bgr256_mean": [103.53, 116.28, 123.675],
    # The Caffe2 weights that want BGR have the deviations folded into their first layer.
    "imagenet_bgr256_std": [1.0, 1.0, 1.0],
}
