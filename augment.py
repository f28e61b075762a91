"""RandAugment and Mixup as the published run of arXiv 2205.01580 applies them, in stateless TensorFlow functions.

    python augment.py [IMAGE.jpg] [--out=augment.png --magnitude=10]

writes a contact sheet: every operation on the picture, with its argument, and a grid of full RandAugment draws.

The sixteen operations are plain functions `op(image, argument)` on uint8 [H, W, 3]. They stay uint8: where arithmetic
is in float, its result is clipped to [0, 255] and truncated. Pixels that come from outside the picture are 128.

Shapes: H height, W width (of one picture; H = W = I in training), B batch, C classes.
"""

import functools
import math
import sys

from absl import app
from absl import flags
import numpy as np
import tensorflow as tf

EMPTY = 128  # fill value of pixels from outside the picture: the middle of the range, near 0 for the model


# --- Grey levels ------------------------------------------------------------------------------------------------------


def _uint8(x):
  """Clips to [0, 255] and truncates."""
  return tf.cast(tf.clip_by_value(x, 0, 255), tf.uint8)


def blend(a, b, factor):
  """a + factor * (b - a): a at 0, b at 1, extrapolated beyond."""
  a, b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
  return _uint8(a + factor * (b - a))


def auto_contrast(image, _=None):
  """Stretches each channel to the full range [0, 255]; a flat channel stays as it is."""
  x = tf.cast(image, tf.float32)
  low, high = tf.reduce_min(x, (0, 1)), tf.reduce_max(x, (0, 1))
  scale = 255 / tf.maximum(high - low, 1)
  return tf.where(high > low, _uint8(x * scale - low * scale), image)


def equalize(image, _=None):
  """Flattens the histogram of each channel."""
  channels = []
  for x in tf.unstack(tf.cast(image, tf.int32), axis=2):
    histogram = tf.math.unsorted_segment_sum(tf.ones([tf.size(x)], tf.int32), tf.reshape(x, [-1]), 256)
    step = (tf.reduce_sum(histogram) - tf.gather(histogram, tf.reduce_max(x))) // 255
    table = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(step, 1)
    # The exclusive cumulative sum is the recipe's table shifted right by one; its first entry is step // 2 // step = 0.
    channels.append(tf.where(step == 0, x, tf.gather(tf.clip_by_value(table, 0, 255), x)))
  return tf.cast(tf.stack(channels, axis=2), tf.uint8)


def invert(image, _=None):
  return 255 - image


def posterize(image, bits):
  """Keeps the `bits` highest bits."""
  return image & (256 - 2 ** (8 - bits))


def solarize(image, threshold):
  """Inverts the pixels that are not below the threshold."""
  return tf.where(image < threshold, image, 255 - image)


def solarize_add(image, addition):
  """Adds to the pixels below 128."""
  return tf.where(image < 128, _uint8(tf.cast(image, tf.int32) + addition), image)


def color(image, factor):
  """From grey (0) to the picture (1) to more colour."""
  return blend(tf.image.rgb_to_grayscale(image), image, factor)


def contrast(image, factor):
  """From flat grey (0) to the picture (1) to more contrast."""
  # The grey is meant to be the picture's mean level. The published code takes the mean over the 256 bins of its
  # histogram instead, number of pixels / 256: 196 for 224x224, whatever the picture. The published numbers used 196.
  return blend(196, image, factor)


def brightness(image, factor):
  """From black (0) to the picture (1) to brighter."""
  return blend(0, image, factor)


def sharpness(image, factor):
  """From smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13 (0) to the picture (1) to sharpened."""
  x = tf.cast(image, tf.int32)
  rows = x[:-2] + x[1:-1] + x[2:]
  smooth = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x[1:-1, 1:-1]) // 13
  inner = blend(smooth, image[1:-1, 1:-1], factor)
  middle = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], 1)
  return tf.concat([image[:1], middle, image[-1:]], 0)  # the filter is not defined on the border


# --- Geometry ---------------------------------------------------------------------------------------------------------


def _warp(image, source):
  """out(x, y) = in(source(x, y)), to the nearest pixel, EMPTY from outside; the origin is the top-left pixel."""
  H, W, _ = image.shape
  coordinates = source(*tf.meshgrid(tf.range(W, dtype=tf.float32), tf.range(H, dtype=tf.float32)))  # x, y [H, W] each
  # Halves round away from zero, as C does. tf.round takes them to the even side: 4 % of a sheared picture's pixels.
  # 1e-4 because what is a half in exact arithmetic (0.3 * 5) may come out just below.
  x, y = (tf.cast(tf.sign(c) * tf.floor(tf.abs(c) + 0.5001), tf.int32) for c in coordinates)
  inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
  # Pixels padded to four bytes are gathered as one word each, not as three bytes.
  words = tf.reshape(tf.bitcast(tf.pad(image, [[0, 0], [0, 0], [0, 1]]), tf.int32), [-1])
  words = tf.where(inside, tf.gather(words, tf.where(inside, y * W + x, 0)), EMPTY * 0x010101)
  return tf.bitcast(words, tf.uint8)[..., :3]


def rotate(image, degrees):
  """Rotates about the centre ((W - 1) / 2, (H - 1) / 2)."""
  cy, cx = ((side - 1) / 2 for side in image.shape[:2])
  radians = tf.cast(degrees, tf.float32) * (math.pi / 180)
  c, s = tf.cos(radians), tf.sin(radians)
  return _warp(image, lambda x, y: (c * (x - cx) - s * (y - cy) + cx, s * (x - cx) + c * (y - cy) + cy))


def shear_x(image, level):
  """out(x, y) = in(x + level * y, y)."""
  return _warp(image, lambda x, y: (x + level * y, y))


def shear_y(image, level):
  """out(x, y) = in(x, y + level * x)."""
  return _warp(image, lambda x, y: (x, y + level * x))


def translate_x(image, pixels):
  """out(x, y) = in(x + pixels, y)."""
  return _warp(image, lambda x, y: (x + pixels, y))


def translate_y(image, pixels):
  """out(x, y) = in(x, y + pixels)."""
  return _warp(image, lambda x, y: (x, y + pixels))


def cutout(image, half_side, center):
  """Empties the rows and columns [center - half_side, center + half_side); center = (row, column)."""
  H, W, _ = image.shape
  rows, columns = ((tf.range(n) >= c - half_side) & (tf.range(n) < c + half_side) for n, c in zip((H, W), tf.unstack(center)))
  return tf.where((rows[:, None] & columns)[..., None], tf.constant(EMPTY, tf.uint8), image)


# --- RandAugment and Mixup --------------------------------------------------------------------------------------------

OPS = (auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, color, contrast, brightness,
       sharpness, shear_x, shear_y, translate_x, translate_y, cutout)


def arguments(magnitude, sign, center, size):
  """What each of OPS gets at a magnitude: {op: tuple}; sign is +1 or -1, size the side of the picture in pixels."""
  factor = 1.8 * magnitude / 10 + 0.1
  pixels = size / 224  # lengths are given for pictures of 224 pixels
  return {
      auto_contrast: (), equalize: (), invert: (),
      rotate: (sign * (30 * magnitude / 10),),
      posterize: (int(4 * magnitude / 10),),
      # The published code compares uint8 with 256 at magnitude 10, which wraps to 0: every pixel is inverted.
      solarize: (int(256 * magnitude / 10) % 256,),
      solarize_add: (int(110 * magnitude / 10),),
      color: (factor,), contrast: (factor,), brightness: (factor,), sharpness: (factor,),
      shear_x: (sign * (0.3 * magnitude / 10),), shear_y: (sign * (0.3 * magnitude / 10),),
      translate_x: (sign * (100 * magnitude / 10 * pixels),), translate_y: (sign * (100 * magnitude / 10 * pixels),),
      cutout: (int(int(40 * magnitude / 10) * pixels), center),
  }


@functools.cache
def _compiled_layer(magnitude):
  """One layer of RandAugment, compiled by XLA once per process, as single TensorFlow kernels are slow at this."""

  @tf.function(jit_compile=True)
  def layer(image, draw):
    H, W, _ = image.shape
    center = tf.cast(draw[2:] * (H, W), tf.int32)
    given = arguments(magnitude, tf.where(draw[1] < 0.5, -1.0, 1.0), center, max(H, W))
    return tf.switch_case(tf.cast(draw[0] * len(OPS), tf.int32),
                          [functools.partial(op, image, *given[op]) for op in OPS])

  return layer


def rand_augment(image, seed, num_layers=2, magnitude=10):
  """RandAugment (Cubuk et al., arXiv 1909.13719): `num_layers` operations, each drawn uniformly and always applied.

  Args:
    image: uint8 [H, W, 3], H and W known when the graph is built.
    seed: int [2]; the same seed gives the same picture, always.
    num_layers: operations one after the other; the same one may come twice.
    magnitude: of every operation, 10 in the published run.

  Returns:
    uint8 [H, W, 3].
  """
  # Per layer: which operation, which sign, which centre.
  for draw in tf.unstack(tf.random.stateless_uniform([num_layers, 4], seed, alg="philox")):
    image = _compiled_layer(magnitude)(image, draw)
  return image


@functools.cache
def _compiled_mix(scale, dtype):
  """Scales and mixes in one pass over the images, compiled by XLA once per process, rather than in one pass an operation."""

  @tf.function(jit_compile=True)
  def mix(images, a):
    images = scale(images)
    return tf.cast(a * images + (1 - a) * tf.roll(images, 1, axis=0), dtype)

  return mix


def mixup(images, labels, seed, p=0.2, scale=tf.identity, dtype=tf.float32):
  """Mixup (Zhang et al., arXiv 1710.09412): every image is mixed with its neighbour, all in the same proportion.

  Args:
    images: [B, H, W, 3], float32 after `scale`.
    labels: float32 [B, C], one-hot.
    seed: int [2].
    p: the proportion is a draw of Beta(p, p), mirrored to be at least 1/2, so that an image dominates its neighbour.
    scale: function(images), applied first.
    dtype: of the mixed images; rounded to at the very end.

  Returns:
    images and labels, a * x + (1 - a) * roll(x, 1, axis=0).
  """
  # a / (a + b) of two Gammas is Beta. In float32 both underflow to 0 at p = 0.2 now and then, and 0 / 0 is a NaN. In
  # float64 that takes p < 0.01, where the proportion is 1 or close to it.
  gammas = tf.random.stateless_gamma([2], seed, p, dtype=tf.float64) + [1e-300, 0]
  a = tf.cast(tf.reduce_max(gammas) / tf.reduce_sum(gammas), tf.float32)
  return _compiled_mix(scale, dtype)(images, a), a * labels + (1 - a) * tf.roll(labels, 1, axis=0)


# --- Contact sheet ----------------------------------------------------------------------------------------------------


def draw_grid(path, images, captions, columns=8):
  """Writes a PNG of captioned pictures, uint8 [H, W, 3] each, `columns` in a row."""
  from PIL import Image, ImageDraw  # comes with tensorboard; only drawing needs it
  height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
  width = max(width, 96)
  sheet = Image.new("RGB", (columns * (width + 4), -(-len(images) // columns) * (height + 18)), "white")
  draw = ImageDraw.Draw(sheet)
  for i, (image, caption) in enumerate(zip(images, captions)):
    x, y = i % columns * (width + 4), i // columns * (height + 18)
    sheet.paste(Image.fromarray(np.asarray(image)), (x, y + 14))
    draw.text((x + 2, y + 1), caption[:width // 6], fill="black")
  with tf.io.gfile.GFile(path, "wb") as f:
    sheet.save(f, "PNG")


def _own_picture(side=224):
  """A picture with an up and a right, smooth and sharp parts, and all colours."""
  y, x = np.mgrid[:side, :side] / side
  picture = np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], -1)
  picture[(x - 0.3) ** 2 + (y - 0.35) ** 2 < 0.03] = (250, 200, 30)
  picture[(abs(x - 0.7) < 0.15) & (abs(y - 0.6) < 0.25)] *= 0.4
  picture[(y > 0.8) & (x * 16 % 2 < 1)] = 20
  return picture.astype(np.uint8)


def main(argv):
  image = _own_picture()
  if len(argv) > 1:
    try:
      image = tf.io.decode_image(tf.io.read_file(argv[1]), 3, expand_animations=False)
    except tf.errors.OpError as error:
      sys.exit(f"Error: {argv[1]} is not a picture that can be read: {error.message}")
    image = tf.cast(tf.image.resize_with_crop_or_pad(image, *[min(image.shape[:2])] * 2), tf.uint8)
    image = tf.cast(tf.image.resize(image, (224, 224), antialias=True), tf.uint8).numpy()
  given = arguments(FLAGS.magnitude, 1.0, tf.constant([80, 150]), 224)
  pictures, captions = [image], ["the picture"]
  for op in OPS:
    pictures.append(tf.function(op, jit_compile=True)(tf.constant(image), *given[op]))
    captions.append(" ".join([op.__name__] + [f"{float(a):.3g}" for a in given[op][:1]]))
  for i in range(56 - len(pictures)):  # seven rows of eight
    pictures.append(rand_augment(tf.constant(image), (0, i), 2, FLAGS.magnitude))
    captions.append(f"rand_augment, seed {i}")
  draw_grid(FLAGS.out, pictures, captions)
  print(f"Wrote {FLAGS.out}: every operation at magnitude {FLAGS.magnitude:g}, then draws of two.")


if __name__ == "__main__":
  FLAGS = flags.FLAGS
  flags.DEFINE_string("out", "augment.png", "Where the contact sheet goes.")
  flags.DEFINE_float("magnitude", 10, "Magnitude of every operation.")
  app.run(main)
