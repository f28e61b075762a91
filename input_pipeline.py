"""From TFDS records to batches: what the training and the evaluation of arXiv 2205.01580 read.

    python input_pipeline.py --dataset=patterns [--data_dir=... --batch_size=128 --image_size=224]

prepares the dataset if it is not there yet, from the archives in `--manual_dir=DIR` (for imagenet2012:
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the second alone). Then it measures images per second of (a) JPEG
decode-and-crop alone, the limit, (b) the training pipeline and (c) the evaluation pipeline, and draws one training batch
as the model sees it.

The order of examples and every random choice are functions of the seed and of the example's place in the endless
stream of epochs: batch k of size B holds the examples k*B ... k*B + B - 1. Nothing else is random, so the pipeline
starts at any step without having decoded what came before, and the number of threads or processes changes nothing (with
one exception, of `skip_bad_images` in `train_batches`).

Shapes: B batch, b this process's share of it, I image side, C classes.
"""

import functools
import os
import statistics
import sys
import time

from absl import app
from absl import flags
import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # spare the reader TensorFlow's start-up messages
import tensorflow as tf
import tensorflow_datasets as tfds

import augment

for _kind in ("GPU", "TPU"):  # TensorFlow feeds the accelerator; it must not take its memory
  tf.config.set_visible_devices([], _kind)

THREADS = os.cpu_count()
WINDOW = 4096  # records shuffled at a time; with one window in use, one read ahead and one being read: 1.4 GB of ImageNet
# Independent streams of random numbers, at most 64. A new one goes to the end, or the old ones change.
STREAMS = ("files", "windows", "crops", "flips", "rand_augment", "mixup")


def seed_for(stream, seed, index):
  """The seed [2] of the index-th draw of a stream."""
  return tf.stack([tf.constant(seed * 64 + STREAMS.index(stream), tf.int64), tf.cast(index, tf.int64)])


class DatasetError(ValueError):
  """There is no such dataset or split; the message says what there is, or how to get it."""


class BadImage(Exception):
  """A record that cannot be used; the message names it."""


# --- Records ----------------------------------------------------------------------------------------------------------


def open_dataset(name, data_dir=None, prepare=False, manual_dir=None):
  """The TFDS builder of a prepared dataset, of the built-in `patterns`, or of a folder `split/class/image.jpg`.

  Args:
    name: a TFDS name, "patterns", or the path of a folder (with at least one "/").
    data_dir: where TFDS keeps prepared datasets; None is TFDS' own default.
    prepare: prepare the dataset if it is not there yet; `patterns`, which is drawn in seconds, always is.
    manual_dir: the folder with the archives that TFDS does not download itself.

  Raises:
    DatasetError: there is no such dataset, or it is not prepared; the message says how to get it.
  """
  if "/" in name and tf.io.gfile.isdir(name):
    builder = tfds.ImageFolder(name)
    if not builder.info.splits:
      raise DatasetError(f"--dataset={name}: no images found; expected {name}/SPLIT/CLASS/IMAGE.jpg (or .jpeg, .png)")
    return builder
  try:
    builder = Patterns(data_dir=data_dir) if name == "patterns" else tfds.builder(name, data_dir=data_dir)
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
    reason = "" if isinstance(error, tfds.core.DatasetNotFoundError) else f" ({' '.join(str(error).split())[:200]})"
    raise DatasetError(f"--dataset={name}: no such folder, and no such dataset in TFDS{reason}; expected a name such as "
                       "imagenet2012 or cifar10, patterns (the built-in demo), or the path of a folder with "
                       "SPLIT/CLASS/IMAGE.jpg") from None
  if prepare or name == "patterns":
    try:
      builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except AssertionError as error:  # the archives are not there
      raise DatasetError(f"--manual_dir={manual_dir}: {' '.join(str(error).split())}") from None
    except FileExistsError:  # another process prepared it first
      return open_dataset(name, data_dir)
  root = builder.data_path.parents[builder.info.full_name.count("/")]
  if not builder.info.splits:
    archives = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    raise DatasetError(f"--dataset={name} is not prepared in {root}. Prepare it with `python input_pipeline.py "
                       f"--dataset={name} --data_dir={root}{' --manual_dir=DIR' * bool(archives)}`, or try the demo, "
                       f"--dataset=patterns. {archives}".rstrip())
  if not isinstance(dict(builder.info.features).get("image"), tfds.features.Image):
    raise DatasetError(f"--dataset={name} has no feature 'image'; it has {', '.join(builder.info.features)}")
  return builder


def num_classes(builder, label="label"):
  """The number of classes C of a label, or of a set of labels; DatasetError if it is no such feature."""
  feature = dict(builder.info.features).get(label)
  feature = getattr(feature, "feature", feature)  # of each label in a set
  if not isinstance(feature, tfds.features.ClassLabel):
    raise DatasetError(f"{builder.name} has no classes in a feature {label!r}; it has {', '.join(builder.info.features)}")
  return feature.num_classes


def split_size(builder, split):
  """The number of examples of a split such as "validation" or "train[:99%]"; DatasetError if there is none."""
  return sum(stop - start for _, start, stop in _ranges(builder, split))


def _ranges(builder, split):
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
  except (ValueError, KeyError, AssertionError):
    parts = []
  parts = [(part.splitname, part.from_ or 0, part.to if part.to is not None else
            builder.info.splits[part.splitname].num_examples) for part in parts]
  if not any(stop > start for _, start, stop in parts):
    raise DatasetError(f"split {split!r} of {builder.name} is unknown or empty; it has "
                     + ", ".join(f"{name} ({info.num_examples:,})" for name, info in builder.info.splits.items()))
  return parts


def read_records(builder, split, label="label", seed=None):
  """Every example of a split once: {"image": encoded bytes, "label": int64 [] or [any], "id": which record this is}.

  With a seed [2], the files of the dataset are read in a random order; without, in the stored one.
  """
  skip_decoding = {"image": tfds.decode.SkipDecoding()}
  if isinstance(builder, tfds.ImageFolder):  # it lists its images in a fixed random order
    parts = [builder.as_dataset(split=name, decoders=skip_decoding).take(stop).skip(start)
             for name, start, stop in _ranges(builder, split)]
    ds = functools.reduce(lambda a, b: a.concatenate(b), parts)
    return ds.map(lambda x: {"image": x["image"], "label": x[label], "id": x["image/filename"]})

  features = {"image": builder.info.features["image"], label: builder.info.features[label]}
  features = tfds.features.FeaturesDict(features)
  def read_file(path, skip, take):
    records = tf.data.TFRecordDataset(path, buffer_size=1 << 20).enumerate().skip(skip).take(take)
    return records.map(lambda i, record: (record, path + "#" + tf.strings.as_string(i)))
  def parse(record, name):
    example = features.deserialize_example(record, decoders=skip_decoding)
    return {"image": example["image"], "label": example[label], "id": name}
  files = builder.info.splits[split].file_instructions
  order = tf.range(len(files))
  if seed is not None:
    order = tf.random.experimental.stateless_shuffle(order, seed, alg="philox")
  table = [tf.gather(np.array(column), order) for column in zip(*((f.filename, f.skip, f.take) for f in files))]
  ds = tf.data.Dataset.from_tensor_slices(tuple(table))
  ds = ds.interleave(read_file, cycle_length=16, block_length=16, num_parallel_calls=16)
  return ds.map(parse, num_parallel_calls=THREADS)


def shuffled_records(builder, split, seed, start=0):
  """The endless stream of epochs from its start-th record on, every epoch in an order of its own.

  An epoch shuffles its files, reads sixteen at a time, and shuffles windows of WINDOW records. Unlike a shuffle buffer,
  a window is a function of its number, and the next one is read ahead while one is used, also across epochs: no wait
  at the beginning of an epoch.
  """
  size = split_size(builder, split)

  @tf.autograph.experimental.do_not_convert  # TFDS warns that it cannot be
  def shuffled_windows(epoch):
    windows = read_records(builder, split, seed=seed_for("files", seed, epoch)).batch(WINDOW)
    def shuffle(number, window):
      number += epoch * (size // WINDOW + 1)  # counted through all epochs
      order = tf.random.experimental.stateless_shuffle(
          tf.range(tf.shape(window["label"])[0]), seed_for("windows", seed, number), alg="philox")
      return {key: tf.gather(value, order) for key, value in window.items()}
    return windows.enumerate().map(shuffle)

  epochs = tf.data.Dataset.range(start // size, tf.int64.max)
  # Skipping reads raw records and decodes nothing.
  return epochs.flat_map(shuffled_windows).prefetch(1).unbatch().skip(start % size)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def _checked(shape):
  """[height, width, ...] as it is; an error beyond 2^27 pixels, as a few bytes can declare more than memory holds."""
  pixels = tf.reduce_prod(tf.cast(shape[:2], tf.float32))
  with tf.control_dependencies([tf.debugging.assert_less(pixels, 2.0 ** 27, "image too large")]):
    return tf.identity(shape)  # what depends on it waits for the check


def decode(image_bytes, choose_box):
  """Encoded bytes -> uint8 [h, w, 3] of a box of the picture: of a JPEG only what is in the box is decoded.

  choose_box: function(shape [height, width, channels]) -> box [y, x, h, w].
  """

  def jpeg():
    box = choose_box(_checked(tf.io.extract_jpeg_shape(image_bytes)))  # decode_image below has a limit of its own
    return tf.io.decode_and_crop_jpeg(image_bytes, box, channels=3)

  def other():
    image = tf.io.decode_image(image_bytes, channels=3, expand_animations=False)
    y, x, h, w = tf.unstack(choose_box(tf.shape(image)))
    return image[y:y + h, x:x + w]

  return tf.cond(tf.io.is_jpeg(image_bytes), jpeg, other)


def decode_random_crop(image_bytes, seed):
  """The "inception crop" (Szegedy et al., arXiv 1409.4842): a random box of 5 to 100 % of the picture, uint8 [h, w, 3]."""

  def choose_box(shape):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape, tf.zeros([0, 0, 4]), seed, min_object_covered=0.0, aspect_ratio_range=(0.75, 1.33),
        area_range=(0.05, 1.0), max_attempts=100, use_image_if_no_bounding_boxes=True)
    return tf.concat([begin[:2], size[:2]], 0)

  return decode(image_bytes, choose_box)


def train_image(image_bytes, seed, index, image_size=224, randaug_layers=2, randaug_magnitude=10):
  """Encoded bytes -> uint8 [I, I, 3]: random crop, resize, flip, RandAugment, all drawn from (seed, index)."""
  image = decode_random_crop(image_bytes, seed_for("crops", seed, index))
  image = tf.image.resize(image, (image_size, image_size))  # bilinear, without antialiasing
  image = tf.ensure_shape(tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8), (image_size, image_size, 3))
  image = tf.image.stateless_random_flip_left_right(image, seed_for("flips", seed, index))
  if randaug_layers:
    image = augment.rand_augment(image, seed_for("rand_augment", seed, index), randaug_layers, randaug_magnitude)
  return image


def eval_image(image_bytes, image_size=224):
  """Encoded bytes -> uint8 [I, I, 3]: the shorter side to I * 256 / 224, central crop."""
  image = decode(image_bytes, lambda shape: tf.concat([[0, 0], shape[:2]], 0))
  sides = tf.cast(tf.shape(image)[:2], tf.float32)
  sides = tf.round(sides * (round(image_size * 256 / 224) / tf.reduce_min(sides)))
  sides = tf.cast(_checked(sides), tf.int32)  # a long thin picture grows
  image = tf.cast(tf.clip_by_value(tf.image.resize(image, sides, method="area"), 0, 255), tf.uint8)
  y, x = tf.unstack((sides - image_size) // 2)
  return tf.ensure_shape(image[y:y + image_size, x:x + image_size], (image_size, image_size, 3))


# --- Batches ----------------------------------------------------------------------------------------------------------


def _label_set(label, num_classes):
  """A label [] or a set of labels [any] -> float32 [C], 1 for each of them."""
  label = tf.reshape(label, [-1])
  tf.debugging.assert_less(tf.cast(label, tf.uint64), tf.cast(num_classes, tf.uint64), "label out of range")
  return tf.minimum(tf.reduce_sum(tf.one_hot(label, num_classes), 0), 1)


def _batches(records, prepare, finish, rows, batch_size, start_step, skip_bad_images):
  """Iterates over one process's share of the batches of a stream of records.

  Args:
    records: Dataset of {"image", "label", "id"}, from the first one of batch `start_step` on.
    prepare: function(index in the stream, record) -> (uint8 image, float32 [C] labels); raises for a bad record.
    finish: function(step, images, labels, good) -> batch; good, bool [rows], is False where an example is all zeros
      because its record was bad.
    rows: the rows of a global batch that this process reads.
    batch_size: B.
    skip_bad_images: whether to go on after a bad record.

  Yields:
    What `finish` returns, as numpy arrays.

  Raises:
    BadImage: a record cannot be decoded, or its label is out of range, and skip_bad_images is False.
  """
  records = records.enumerate(start_step * batch_size)
  if len(rows) < batch_size:
    wanted = tf.constant([row in rows for row in range(batch_size)])
    records = records.filter(lambda index, _: wanted[index % batch_size])

  def example(index, record):
    return (*prepare(index, record), True)

  def example_or_zeros(index, record):
    # ignore_errors on the whole stream would drop the row and shift all later ones; on a stream of one it leaves a gap.
    ds = tf.data.Dataset.from_tensors((index, record)).map(example)
    zeros = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), ds.element_spec)
    return ds.ignore_errors().concatenate(tf.data.Dataset.from_tensors(zeros)).take(1).get_single_element()

  ds = records.map(example_or_zeros if skip_bad_images else example, num_parallel_calls=THREADS)
  ds = ds.batch(len(rows), drop_remainder=True).enumerate(start_step)
  ds = ds.map(lambda step, batch: finish(step, *batch), num_parallel_calls=2).prefetch(2)
  done = 0
  try:
    for batch in ds.as_numpy_iterator():
      yield batch
      done += 1
  except (tf.errors.DataLossError, tf.errors.NotFoundError, tf.errors.FailedPreconditionError) as error:
    reason = error.message.split("}} ")[-1].split(" [Op")[0]
    raise BadImage(f"a file of the dataset is damaged or missing ({reason}); prepare the dataset again") from None
  except tf.errors.InvalidArgumentError:
    for index, record in records.skip(done * len(rows)):  # which one was it?
      try:
        prepare(index, record)
      except tf.errors.InvalidArgumentError as error:
        raise BadImage(f"bad record {record['id'].numpy().decode()}: {error.message.splitlines()[0]} "
                       "(--skip_bad_images leaves such records out)") from None
    raise


def scale(images):
  """uint8 [0, 255] -> float32 [-1, 1]."""
  # The same as x / 127.5 - 1, ordered so that 255 gives exactly 1 even where XLA multiplies by the reciprocal.
  return (tf.cast(images, tf.float32) - 127.5) / 127.5


def train_batches(builder, split, batch_size, *, start_step=0, image_size=224, randaug_layers=2, randaug_magnitude=10,
                  mixup_p=0.2, dtype=tf.bfloat16, seed=0, process_index=0, process_count=1, skip_bad_images=False):
  """The endless training batches from a step on.

  Args:
    builder: of `open_dataset`.
    split: "train[:99%]" in the report.
    batch_size: B, a multiple of process_count.
    image_size: I, in pixels.
    dtype: of the images; the one the model multiplies in, so that no more bytes are moved than it reads.
    process_index, process_count: this process takes the rows [index * b, (index + 1) * b), b = B / process_count.
    skip_bad_images: a record that cannot be used is replaced by another row that this process read, so that no later step
      changes (but these batches depend on the number of processes).

  Yields:
    dict of numpy arrays: images [b, I, I, 3] in [-1, 1], labels float32 [b, C], bad int32 [], the skipped records.

  Raises:
    BadImage: a record cannot be used, and skip_bad_images is False.
  """
  C = num_classes(builder)
  b = batch_size // process_count
  mine = range(process_index * b, (process_index + 1) * b)
  # Mixup needs the row before the first one, too: of B = 8, process 1 of 2 reads rows 3 to 7, process 0 reads 0 to 3 and 7.
  rows = {(mine[0] - 1) % batch_size, *mine}
  cut = slice(0, b) if process_index == 0 else slice(1, b + 1)

  def prepare(index, record):
    image = train_image(record["image"], seed, index, image_size, randaug_layers, randaug_magnitude)
    return image, _label_set(record["label"], C)

  def finish(step, images, labels, good):
    bad = tf.reduce_sum(tf.cast(~good[cut], tf.int32))
    if skip_bad_images:  # a bad row becomes a copy of the first good one
      source = tf.where(good, tf.range(len(rows)), tf.argmax(tf.cast(good, tf.int32), output_type=tf.int32))
      images, labels = tf.gather(images, source), tf.gather(labels, source)
    if mixup_p:
      images, labels = augment.mixup(images, labels, seed_for("mixup", seed, step), mixup_p, scale, dtype)
    else:
      images = tf.cast(scale(images), dtype)
    return {"images": images[cut], "labels": labels[cut], "bad": bad}

  records = shuffled_records(builder, split, seed, start_step * batch_size)
  return _batches(records, prepare, finish, rows, batch_size, start_step, skip_bad_images)


def eval_batches(builder, split, batch_size, *, label="label", image_size=224, dtype=tf.bfloat16, process_index=0,
                 process_count=1, skip_bad_images=False):
  """Every example of a split once.

  Args:
    label: the feature that holds the label, or the set of right labels ("real_label").
    The rest are as in `train_batches`.

  Yields:
    dict of numpy arrays: images [b, I, I, 3] in [-1, 1], labels float32 [b, C], 1 for each right answer, bad int32 [].
    Rows without any label do not count: images that have none, skipped ones, and what fills the last batch.

  Raises:
    BadImage: as in `train_batches`.
  """
  C = num_classes(builder, label)
  b = batch_size // process_count

  def prepare(_, record):
    return eval_image(record["image"], image_size), _label_set(record["label"], C)

  def finish(_, images, labels, good):
    return {"images": tf.cast(scale(images), dtype), "labels": labels, "bad": tf.reduce_sum(tf.cast(~good, tf.int32))}

  records = read_records(builder, split, label).map(lambda x: x | {"label": tf.reshape(x["label"], [-1])})
  blank = {"image": tf.io.encode_png(tf.zeros([1, 1, 3], tf.uint8)), "label": tf.zeros([0], tf.int64), "id": "blank"}
  blanks = tf.data.Dataset.from_tensors(blank).repeat(-split_size(builder, split) % batch_size)
  return _batches(records.concatenate(blanks), prepare, finish, range(process_index * b, (process_index + 1) * b),
                  batch_size, 0, skip_bad_images)


# --- The demo dataset -------------------------------------------------------------------------------------------------


# Two-coloured textures of period 1, as functions of coordinates u to the right, v down -> bool.
PATTERNS = {
    "bricks": lambda u, v: (v % 1 < 0.2) | ((u / 2 + v // 1 / 2) % 1 < 0.1),
    "checks": lambda u, v: (u // 0.5 + v // 0.5) % 2 < 1,
    "clouds": None,  # smooth noise
    "columns": lambda u, v: u % 1 < 0.5,
    "crosses": lambda u, v: (abs(u % 1 - 0.5) < 0.12) & (abs(v % 1 - 0.5) < 0.38) |
                            (abs(v % 1 - 0.5) < 0.12) & (abs(u % 1 - 0.5) < 0.38),
    "dots": lambda u, v: np.hypot((u + v // 1 / 2) % 1 - 0.5, v % 1 - 0.5) < 0.25,
    "rings": lambda u, v: abs(np.hypot(u % 1 - 0.5, v % 1 - 0.5) - 0.33) < 0.1,
    "rows": lambda u, v: v % 1 < 0.5,
    "triangles": lambda u, v: u % 1 < v % 1,
    "waves": lambda u, v: (v + 0.25 * np.sin(2 * np.pi * u)) % 1 < 0.5,
}


class Patterns(tfds.core.GeneratorBasedBuilder):
  """Ten textures that stay what they are in a small crop, flipped, inverted, recoloured, sheared or rotated."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(PATTERNS)),
        }), supervised_keys=("image", "label"))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 8000), "validation": self._generate_examples(1, 1000)}

  def _generate_examples(self, seed, count):
    rng = np.random.default_rng(seed)
    for i in range(count):
      label = list(PATTERNS)[i % len(PATTERNS)]
      yield i, {"image": _draw_pattern(rng, PATTERNS[label]), "label": label}


def _draw_pattern(rng, pattern):
  """uint8 [H, W, 3]: a texture of random scale, phase, angle and colours, unevenly lit, with noise."""
  H, W = rng.integers(80, 144, 2)
  y, x = np.mgrid[:H, :W]
  if pattern is None:
    coarse = rng.standard_normal((7, 7, 1))
    smooth = tf.image.resize(coarse, (H, W), "bicubic").numpy()[..., 0]
    mask = smooth > 0
  else:
    angle, period = rng.uniform(-0.2, 0.2), rng.uniform(14, 24)
    u = (np.cos(angle) * x - np.sin(angle) * y) / period + rng.uniform()
    v = (np.sin(angle) * x + np.cos(angle) * y) / period + rng.uniform()
    mask = pattern(u, v)
  colors = rng.uniform(0, 255, (2, 3))
  while abs(colors[0] - colors[1]).mean() < 100:
    colors = rng.uniform(0, 255, (2, 3))
  light = 1 + rng.uniform(-0.3, 0.3) * (x / W - 0.5) + rng.uniform(-0.3, 0.3) * (y / H - 0.5)
  image = np.where(mask[..., None], *colors) * light[..., None] + rng.normal(0, rng.uniform(3, 12), (H, W, 3))
  return image.clip(0, 255).astype(np.uint8)


# --- Measuring itself -------------------------------------------------------------------------------------------------


def main(_):
  builder = open_dataset(FLAGS.dataset, FLAGS.data_dir, prepare=True, manual_dir=FLAGS.manual_dir)
  print(f"{FLAGS.dataset} is prepared:", ", ".join(f"{name} {s.num_examples:,}" for name, s in builder.info.splits.items()))
  if "label" not in builder.info.features:
    return print("It has no feature 'label', so there is nothing to train on or to measure.")
  B, size = FLAGS.batch_size, FLAGS.image_size
  split = FLAGS.split or ("train" if "train" in builder.info.splits else list(builder.info.splits)[0])

  started = time.time()
  batch = next(train_batches(builder, split, B, image_size=size, dtype=tf.float32))
  print(f"First training batch after {time.time() - started:.1f} s.")
  names, count = builder.info.features["label"].names, min(16, B)
  captions = [", ".join(f"{p:.2f} {names[c]}" for c, p in enumerate(label) if p) for label in batch["labels"][:count]]
  augment.draw_grid(FLAGS.out, np.uint8((batch["images"][:count] + 1) * 127.5), captions)
  print(f"Wrote {FLAGS.out}, {count} training images as the model sees them.")

  def decode_and_crop():  # of records in memory: not the disk's limit, but the decoder's
    ds = read_records(builder, split).cache().repeat().enumerate()
    ds = ds.map(lambda i, x: decode_random_crop(x["image"], seed_for("crops", 0, i))[0, 0, 0], num_parallel_calls=THREADS)
    return ds.batch(B).prefetch(2).as_numpy_iterator()

  def evaluation():
    while True:
      yield from eval_batches(builder, split, B, image_size=size)

  iterators = {"decode-and-crop alone": decode_and_crop(), "training": train_batches(builder, split, B, image_size=size),
               "evaluation": evaluation()}
  rates = {name: [] for name in iterators}
  for _ in range(FLAGS.rounds):
    for name, iterator in iterators.items():
      for _ in range(4):  # what the last round left prefetched
        next(iterator)
      started = time.perf_counter()
      for _ in range(FLAGS.batches):
        next(iterator)
      rates[name].append(FLAGS.batches * B / (time.perf_counter() - started))
      time.sleep(1)  # until the prefetching is done
  limit = statistics.median(rates["decode-and-crop alone"])
  for name, rate in rates.items():
    rate = statistics.median(rate)
    print(f"{name:22} {rate:8,.0f} images/s  {rate / limit:.2f} of the limit")


if __name__ == "__main__":
  FLAGS = flags.FLAGS
  flags.DEFINE_string("dataset", "patterns", "TFDS name, patterns, or the path of a folder split/class/image.jpg.")
  flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets.")
  flags.DEFINE_string("manual_dir", None, "The folder of archives to prepare the dataset from.")
  flags.DEFINE_string("split", None, "What to read; by default train, or what there is.")
  flags.DEFINE_integer("batch_size", 128, "Images per batch.")
  flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
  flags.DEFINE_integer("rounds", 5, "Measurements of each pipeline, in turn; the median counts.")
  flags.DEFINE_integer("batches", 10, "Batches per measurement.")
  flags.DEFINE_string("out", "batch.png", "Where the picture of a batch goes.")
  try:
    app.run(main)
  except (DatasetError, BadImage) as error:
    sys.exit(f"Error: {error}")
