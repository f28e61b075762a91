"""From files to batches: what the training and the evaluation of arXiv 2205.01580 read.

    python input_pipeline.py --dataset=patterns [--data_dir=... --batch_size=128 --image_size=224]

prepares the data set if it is not there yet, from the archives in `--manual_dir=DIR` (for
imagenet2012: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the second alone); with
`--prepare_only` that is all. Then it draws one training batch as the model sees it, and measures
the training and the evaluation pipeline, and JPEG decode-and-crop alone, which limits both.

The order of examples and every random choice are functions of the seed and of the example's place
in the endless stream of epochs: batch k of size B holds the examples k*B ... k*B + B - 1. So the
pipeline starts at any step without having decoded what came before, and the number of threads or
processes changes nothing (with one exception, of `skip_bad_images`).

A `dataset` below is a TFDS builder or a `Folder`; `open_dataset` makes both.

Shapes: B batch, b this process's share of it, I image side, C classes; [] is a number.
"""

import collections
import functools
import os
import random
import re
import sys
import time
import types

from absl import app
from absl import flags
import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # spare the reader TensorFlow's first messages
import tensorflow as tf
import tensorflow_datasets as tfds

import augment

for _kind in ("GPU", "TPU"):  # TensorFlow feeds the accelerator; it must not take its memory
  tf.config.set_visible_devices([], _kind)

THREADS = os.cpu_count() + 2  # as one now and then waits for another
# Independent streams of random numbers, at most 64. A new one goes to the end.
STREAMS = ("files", "windows", "crops", "flips", "rand_augment", "mixup")


def seed_for(stream, seed, index):
  """The seed [2] of the index-th draw of a stream."""
  return tf.stack([tf.constant(seed * 64 + STREAMS.index(stream), tf.int64),
                   tf.cast(index, tf.int64)])


class DatasetError(ValueError):
  """A data set, a split or a record that cannot be used; the message says what to do."""


# --- Pictures -------------------------------------------------------------------------------------


def _checked(shape):
  """The same [height, width, ...], but an error beyond 2^27 pixels, which few bytes can declare."""
  pixels = tf.reduce_prod(tf.cast(shape[:2], tf.float32))
  with tf.control_dependencies([tf.debugging.assert_less(pixels, 2.0 ** 27, "image too large")]):
    return tf.identity(shape)  # what depends on it waits for the check


def decode(image_bytes, choose_box):
  """Encoded bytes -> uint8 [h, w, 3] of a box of the picture; of a JPEG only the box is decoded.

  choose_box: function(shape [height, width, channels]) -> box [y, x, h, w].
  """

  def jpeg():
    box = choose_box(_checked(tf.io.extract_jpeg_shape(image_bytes)))
    return tf.io.decode_and_crop_jpeg(image_bytes, box, channels=3)

  def other():  # decode_image has a limit of its own
    image = tf.io.decode_image(image_bytes, channels=3, expand_animations=False)
    return tf.image.crop_to_bounding_box(image, *tf.unstack(choose_box(tf.shape(image))))

  return tf.cond(tf.io.is_jpeg(image_bytes), jpeg, other)


def decode_random_crop(image_bytes, seed):
  """The "inception crop" (arXiv 1409.4842): a random box of 5 to 100 % of the picture."""

  def choose_box(shape):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape, tf.zeros([0, 0, 4]), seed, min_object_covered=0.0, aspect_ratio_range=(0.75, 1.33),
        area_range=(0.05, 1.0), max_attempts=100, use_image_if_no_bounding_boxes=True)
    return tf.concat([begin[:2], size[:2]], 0)

  return decode(image_bytes, choose_box)


def train_image(image_bytes, seed, index, image_size=224, randaug_layers=2, randaug_magnitude=10):
  """Encoded bytes -> uint8 [I, I, 3]: crop, resize, flip, RandAugment, drawn from (seed, index)."""
  image = decode_random_crop(image_bytes, seed_for("crops", seed, index))
  image = tf.image.resize(image, (image_size, image_size))  # bilinear, without antialiasing
  flip = tf.random.stateless_uniform([], seed_for("flips", seed, index)) < 0.5
  return augment.rand_augment(image, seed_for("rand_augment", seed, index), randaug_layers,
                              randaug_magnitude, flip)


def eval_image(image_bytes, image_size=224):
  """Encoded bytes -> uint8 [I, I, 3]: the shorter side to I * 256 / 224, central crop."""
  image = decode(image_bytes, lambda shape: tf.concat([[0, 0], shape[:2]], 0))
  sides = tf.cast(tf.shape(image)[:2], tf.float32)
  sides = tf.round(sides * (round(image_size * 256 / 224) / tf.reduce_min(sides)))
  sides = tf.cast(_checked(sides), tf.int32)  # a long thin picture grows
  image = tf.cast(tf.image.resize(image, sides, method="area"), tf.uint8)
  return tf.image.resize_with_crop_or_pad(image, image_size, image_size)


def scale(images):
  """uint8 [0, 255] -> float32 [-1, 1]."""
  # x / 127.5 - 1, ordered so that 255 gives exactly 1 even where XLA multiplies by the reciprocal.
  return (tf.cast(images, tf.float32) - 127.5) / 127.5


def label_set(label, positions):
  """A label [] or a set of labels [any] -> float32 [C], 1 at the position of each of them."""
  labels = tf.one_hot(tf.gather(positions, label), len(positions))  # fails if it is out of range
  return labels if labels.shape.rank == 1 else tf.minimum(tf.reduce_sum(labels, 0), 1)


# --- Batches --------------------------------------------------------------------------------------


def train_batches(dataset, split, batch_size, *, start_step=0, image_size=224, randaug_layers=2,
                  randaug_magnitude=10, mixup_p=0.2, dtype="bfloat16", seed=0, label_names=None,
                  process_index=0, process_count=1, skip_bad_images=False):
  """The endless training batches from a step on.

  Args:
    dataset: of `open_dataset`.
    split: "train[:99%]" in the report.
    batch_size: B, a multiple of process_count.
    image_size: I, in pixels.
    dtype: of the images; the one the model multiplies in, as more bytes need not be moved.
    label_names: the C classes in the model's order; None: in the data set's.
    process_index, process_count: this process takes the rows [index * b, (index + 1) * b),
      b = B / process_count.
    skip_bad_images: another row of this process stands in for a record that cannot be used, so
      that no later step changes (but these batches depend on the number of processes).

  Yields:
    dict of numpy arrays: images [b, I, I, 3] in [-1, 1], labels float32 [b, C], and bad, bool [b]:
    which rows stand in for a record that could not be used.

  Raises:
    DatasetError: a record cannot be used, and skip_bad_images is False, or none that this process
      reads of a batch can; or a file of the data set is damaged.
  """
  b = batch_size // process_count
  first = process_index * b
  # Mixup needs the row before the first one, too: of B = 8, process 1 of 2 reads rows 3 to 7,
  # process 0 reads 0 to 3 and 7. They arrive in this order; the one too many is left out.
  rows = {(first - 1) % batch_size, *range(first, first + b)}
  mine = slice(0, b) if process_index == 0 else slice(1, b + 1)
  read, positions = record_reader(dataset), label_positions(dataset, label_names)

  def example(index, record):
    image_bytes, label = read(record)
    image = train_image(image_bytes, seed, index, image_size, randaug_layers, randaug_magnitude)
    return {"images": image, "labels": label_set(label, positions)}

  def finish(step, batch):
    if skip_bad_images:  # a bad row becomes a copy of the first good one
      good = tf.argmax(tf.cast(~batch["bad"], tf.int32), output_type=tf.int32)
      tf.debugging.assert_equal(batch["bad"][good], False, "no record of a batch can be used")
      source = tf.where(batch["bad"], good, tf.range(len(rows)))
      batch |= {key: tf.gather(x, source) for key, x in batch.items() if key != "bad"}
    if mixup_p:
      batch["images"], batch["labels"] = augment.mixup(
          batch["images"], batch["labels"], seed_for("mixup", seed, step), mixup_p, scale, dtype)
    else:
      batch["images"] = tf.cast(scale(batch["images"]), dtype)
    return {key: x[mine] for key, x in batch.items()}

  records_from = functools.partial(shuffled_records, dataset, split, seed)
  _, batches = _batches(records_from, example, finish, rows, batch_size, start_step,
                        skip_bad_images)
  return batches


def eval_batches(dataset, split, batch_size, *, label="label", image_size=224, dtype="bfloat16",
                 label_names=None, process_index=0, process_count=1, skip_bad_images=False,
                 passes=1):
  """Every example of a split once.

  Args:
    label: the feature that holds the label, or the set of right labels ("real_label").
    passes: over the split.
    The rest are as in `train_batches`.

  Yields:
    dict of numpy arrays: images [b, I, I, 3] in [-1, 1], labels float32 [b, C], 1 for each right
    answer, mask, bool [b]: which rows are real, and bad, bool [b]: which could not be used. Not
    real are the bad ones, and what fills the last batch.

  Raises:
    DatasetError: as there; a batch without a usable record is none.
  """
  b = batch_size // process_count
  rows = range(process_index * b, (process_index + 1) * b)
  read, positions = record_reader(dataset, label), label_positions(dataset, label_names, label)

  def example(_, record):
    image_bytes, labels = read(record)
    return {"images": eval_image(image_bytes, image_size), "labels": label_set(labels, positions)}

  def finish(_, batch):
    return batch | {"images": tf.cast(scale(batch["images"]), dtype), "mask": ~batch["bad"]}

  records_from = read_records(dataset, split).repeat(passes).skip
  spec, batches = _batches(records_from, example, finish, rows, batch_size, 0, skip_bad_images)
  blank = {key: np.zeros([b, *x.shape[1:]], x.dtype.as_numpy_dtype) for key, x in spec.items()}
  for _ in range(-(-split_size(dataset, split) * passes // batch_size)):
    batch = next(batches, {key: x[:0] for key, x in blank.items()})  # others may have the last rows
    missing = b - len(batch["mask"])
    yield {key: np.concatenate([x, blank[key][:missing]]) if missing else x
           for key, x in batch.items()}


def _batches(records_from, example, finish, rows, batch_size, start_step, skip_bad_images):
  """One process's share of the batches of a stream of records, from a step on.

  Args:
    records_from: function(index in the stream) -> Dataset of the records from there on.
    example: function(index in the stream, record) -> dict of tensors; fails if the record is bad.
    finish: function(step, batch, with "bad", bool [rows]: which are zeros as their record is bad).
    rows: the rows of a global batch that this process reads.

  Returns:
    The types of what `finish` returns, and an iterator over it as numpy arrays.
  """
  def numbered(step):  # with their indices in the stream
    records = records_from(step * batch_size).enumerate(step * batch_size)
    if len(rows) == batch_size:
      return records
    wanted = tf.constant([row in rows for row in range(batch_size)])
    return records.filter(lambda index, _: wanted[index % batch_size])

  def good(index, record):
    return example(index, record) | {"bad": False}

  def good_or_zeros(index, record):
    # ignore_errors on the whole stream would drop the row and shift all later ones. So each record
    # is a data set of its own, and zeros follow where it fails.
    ds = tf.data.Dataset.from_tensors((index, record)).map(good)
    zeros = {key: tf.zeros(x.shape, x.dtype) for key, x in ds.element_spec.items()} | {"bad": True}
    ds = ds.ignore_errors().concatenate(tf.data.Dataset.from_tensors(zeros))
    return ds.take(1).get_single_element()

  ds = numbered(start_step).map(good_or_zeros if skip_bad_images else good,
                                num_parallel_calls=THREADS)
  ds = ds.batch(len(rows), num_parallel_calls=2).enumerate(start_step)
  ds = ds.map(finish, num_parallel_calls=2).prefetch(2)
  options = tf.data.Options()
  options.autotune.enabled = False  # all is set; with it on, a process ends seconds after its work

  def iterate():
    step = start_step
    try:
      for batch in ds.with_options(options).as_numpy_iterator():
        yield batch
        step += 1
    except tf.errors.OpError as error:
      try:
        for index, record in numbered(step).take(0 if skip_bad_images else len(rows)):
          try:  # which one was it?
            example(index, record)
          except tf.errors.OpError as bad:
            raise DatasetError(f"bad record {record_name(record)}: {_reason(bad)} "
                               "(--skip_bad_images leaves such records out)") from None
      except tf.errors.OpError:  # it was the stream itself
        pass
      raise DatasetError(f"{_reason(error)}: look at the files of the data set, or prepare it "
                         "again") from None

  return ds.element_spec, iterate()


def _reason(error):
  """What TensorFlow says of an error, without where in a graph it was."""
  message = error.message.split("assertion failed: [")[-1].split("}} ")[-1].splitlines()[0]
  return re.split(r" \[Op|\] \[", message)[0]


# --- The order of records -------------------------------------------------------------------------

# Raise this when a change moves records in the stream: a run of another order does not resume.
ORDER = 1


def shuffled_records(dataset, split, seed, start=0):
  """The endless stream of epochs from its start-th record on, every epoch in an order of its own.

  An epoch shuffles its files, reads sixteen at a time, and shuffles windows of 4,096 records (fewer
  if they are large). Unlike a shuffle buffer, a window is a function of its number, and the next
  one is read ahead while one is used, so there is no wait where an epoch ends.
  """
  size, window = split_size(dataset, split), window_size(dataset, split)

  @tf.autograph.experimental.do_not_convert  # TFDS warns that it cannot be
  def shuffled_windows(epoch):
    windows = read_records(dataset, split, seed_for("files", seed, epoch)).batch(window)
    def shuffle(number, records):
      number += epoch * (size // window + 1)  # counted through all epochs
      order = tf.random.experimental.stateless_shuffle(
          tf.range(tf.size(records["path"])), seed_for("windows", seed, number), alg="philox")
      return {key: tf.gather(value, order) for key, value in records.items()}
    return windows.enumerate().map(shuffle)

  epochs = tf.data.Dataset.range(start // size, tf.int64.max)
  # Skipping reads raw records and decodes nothing.
  return epochs.flat_map(shuffled_windows).prefetch(1).unbatch().skip(start % size)


def window_size(dataset, split):
  """How many records are shuffled at a time: 4,096, or as many as are 512 MiB on average."""
  infos = [dataset.info.splits[name] for name, *_ in _ranges(dataset, split)]
  mean = sum(s.num_bytes or 0 for s in infos) / sum(s.num_examples for s in infos)
  return max(1, min(4096, int(2 ** 29 // max(mean, 1))))


def read_records(dataset, split, seed=None):
  """Every record of a split once, as it is stored, for `record_reader` and `record_name`.

  With a seed [2], the files of TFDS are read in a random order; without, in the stored one. Folders
  have a fixed order.
  """
  if isinstance(dataset, Folder):
    return tf.data.Dataset.from_tensor_slices({
        key: tf.concat([dataset.files[name][key][numbers.start:numbers.stop]
                        for name, numbers in _ranges(dataset, split)], 0)
        for key in ("path", "label")})

  def read_file(path, skip, take):
    examples = tf.data.TFRecordDataset(path, buffer_size=1 << 20).skip(skip).take(take)
    paths = tf.data.Dataset.from_tensors(path).repeat()
    numbers = tf.data.Dataset.range(skip, tf.int64.max)
    return tf.data.Dataset.zip({"example": examples, "path": paths, "number": numbers})

  files = dataset.info.splits[split].file_instructions
  order = tf.range(len(files))
  if seed is not None:
    order = tf.random.experimental.stateless_shuffle(order, seed, alg="philox")
  columns = zip(*((f.filename, f.skip, f.take) for f in files))
  ds = tf.data.Dataset.from_tensor_slices(tuple(tf.gather(np.array(c), order) for c in columns))
  return ds.interleave(read_file, cycle_length=16, block_length=16, num_parallel_calls=16)


def record_reader(dataset, label="label"):
  """function(record of `read_records`) -> encoded picture, and its label, int64 [] or [any]."""
  if isinstance(dataset, Folder):
    return lambda record: (tf.io.read_file(record["path"]), record["label"])
  features = tfds.features.FeaturesDict({name: dataset.info.features[name]
                                         for name in ("image", label)})
  def read(record):
    example = features.deserialize_example(
        record["example"], decoders={"image": tfds.decode.SkipDecoding()})
    return example["image"], example[label]
  return read


def record_name(record):
  """Which record it is: the path of a picture, or of a file of TFDS and the number in it."""
  path = record["path"].numpy().decode("utf-8", "backslashreplace")
  return f"{path}#{record['number'].numpy()}" if "number" in record else path


# --- Where records come from ----------------------------------------------------------------------


ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")  # what TensorFlow decodes


class Folder:
  """Pictures in SPLIT/CLASS/, at any depth, with the part of a TFDS builder that is used here.

  files: {split: {"path": strings, "label": int64}}, in the constant random order of
    tfds.ImageFolder: a part such as train[99%:] is a sample of all classes, the same in every run.
  notes: lines about what was left out.
  """

  def __init__(self, root):
    found = collections.defaultdict(lambda: collections.defaultdict(list))  # split, class: paths
    left_out, self.files, self.notes, splits = collections.Counter(), {}, [], {}
    walk = tf.io.gfile.walk if "://" in root else functools.partial(os.walk, followlinks=True)
    for folder, _, names in walk(root):
      split, *below = os.path.relpath(folder, root).split("/")
      if any(part.startswith(".") for part in (split, *below)):
        continue  # hidden, or the root itself
      paths = found[split][below[0]] if below else []
      for name in names:
        if name.startswith("."):
          continue
        ending = os.path.splitext(name)[1].lower()
        if below and ending in ENDINGS:
          paths.append(os.path.join(folder, name))
        else:
          left_out[f"{ending or name} of {split}" if below else f"in {split}, but in no CLASS"] += 1
    classes = sorted(set().union(*found.values()))
    for split in sorted(found):
      files = [(os.fsencode(path), label) for label, name in enumerate(classes)
               for path in sorted(found[split][name])]
      random.Random(split).shuffle(files)
      self.files[split] = {"path": tf.constant([path for path, _ in files], tf.string),
                           "label": tf.constant([label for _, label in files], tf.int64)}
      splits[split] = types.SimpleNamespace(num_examples=len(files), num_bytes=0)
      empty = [name for name in classes if not found[split][name]]
      self.notes += [f"{root}: {split} has no picture of {_some(empty)}"] * bool(empty)
    if left_out:
      what = _some(f"{count:,} {kind}" for kind, count in left_out.items())
      self.notes.append(f"{root}: left out {what}; expected SPLIT/CLASS/*({'|'.join(ENDINGS)})")
    if not any(info.num_examples for info in splits.values()):
      raise DatasetError("; ".join([f"--dataset={root}: no images found", *self.notes]))
    label = tfds.features.ClassLabel(names=classes)
    self.name, self.info = root, types.SimpleNamespace(
        features={"image": tfds.features.Image(), "label": label}, splits=splits)


def _some(names):
  """The first of many names."""
  names = list(names)
  return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def open_dataset(name, data_dir=None, prepare=False, manual_dir=None):
  """A prepared data set: the builder of a TFDS name or of the built-in `patterns`, or a `Folder`.

  Args:
    name: a TFDS name, "patterns", or the path of a folder (with at least one "/").
    data_dir: where TFDS keeps prepared data sets; None is TFDS' own default.
    prepare: prepare it if it is not there yet; `patterns`, which is drawn in seconds, always is.
    manual_dir: the folder with the archives that TFDS does not download itself.

  Raises:
    DatasetError: there is no such data set, or it is not prepared; the message says how to get it.
  """
  if "/" in name and tf.io.gfile.isdir(name):
    return Folder(name)
  try:
    builder = (Patterns if name == "patterns" else functools.partial(tfds.builder, name))(
        data_dir=data_dir)
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
    reason = "" if isinstance(error, tfds.core.DatasetNotFoundError) else f" ({error})"
    hint = f"; did you mean --dataset=./{name} ?" * bool(name and tf.io.gfile.isdir(name))
    raise DatasetError(
        f"--dataset={name}: no such folder, and no such data set in TFDS; expected a name such as "
        "imagenet2012 or cifar10, patterns (the built-in demo), or the path of a folder with "
        f"SPLIT/CLASS/IMAGE.jpg{hint}{' '.join(reason.split())[:200]}") from None
  if prepare or name == "patterns":
    if name == "patterns":
      tfds.disable_progress_bar()  # it says itself how far it is
    try:
      builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except AssertionError as error:  # the archives are not there
      raise DatasetError(f"--manual_dir={manual_dir}: {' '.join(str(error).split())}") from None
  if not builder.info.splits:
    root = builder.data_path.parents[builder.info.full_name.count("/")]
    archives = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
    raise DatasetError(
        f"--dataset={name} is not prepared in {root}. Prepare it with `python input_pipeline.py "
        f"--dataset={name} --data_dir={root}{' --manual_dir=DIR' * bool(archives)}`, or try the "
        f"demo, --dataset=patterns. {archives}".rstrip())
  if not isinstance(dict(builder.info.features).get("image"), tfds.features.Image):
    raise DatasetError(f"--dataset={name} has no feature 'image'; it has "
                       f"{', '.join(builder.info.features)}")
  return builder


def notes(dataset):
  """Lines about a data set that a user should read before training on it."""
  if isinstance(dataset, Folder):
    return dataset.notes
  return [f"{dataset.name} is stored in the order in which it was made. If that is by class, "
          "batches are of few classes, as only windows of 4,096 records are shuffled: prepare it "
          "again without disable_shuffling=True."] * bool(dataset.info.disable_shuffling)


def is_set(dataset, label="label"):
  """Whether a label is a set of classes, of any size."""
  return isinstance(dict(dataset.info.features).get(label), tfds.features.Sequence)


def class_names(dataset, label="label"):
  """The names of the C classes of a label, or of a set of labels; DatasetError if it has none."""
  feature = dict(dataset.info.features).get(label)
  feature = feature.feature if is_set(dataset, label) else feature
  if not isinstance(feature, tfds.features.ClassLabel):
    raise DatasetError(f"{dataset.name} has no classes in a feature {label!r}; it has "
                       f"{', '.join(dataset.info.features)}")
  return tuple(feature.names)


def label_positions(dataset, names=None, label="label"):
  """Where each class of a data set stands among the classes of a model: a list of ints.

  names: the model's classes; None: the data set's own. DatasetError if they are not the same ones;
    where one side has mere numbers for names, their order counts.
  """
  own = class_names(dataset, label)
  names = own if names is None else tuple(names)
  if len(own) == len(names) and any(all(map(str.isdigit, some)) for some in (own, names)):
    return list(range(len(own)))
  if set(own) != set(names):
    raise DatasetError(
        f"{dataset.name} has {len(own)} classes, the model {len(names)}; only in the data set: "
        f"{_some(n for n in own if n not in names) or 'none'}; only in the model: "
        f"{_some(n for n in names if n not in own) or 'none'}")
  return [names.index(name) for name in own]


def split_size(dataset, split):
  """The number of examples of a split such as "train[:99%]"; DatasetError if there is none."""
  return sum(len(numbers) for _, numbers in _ranges(dataset, split))


def _ranges(dataset, split):
  """[(name, range of numbers)] of the parts of a split."""
  splits = dataset.info.splits
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    parts = [(p.splitname, range(splits[p.splitname].num_examples)[p.from_:p.to]) for p in parts]
  except (ValueError, KeyError, AssertionError, AttributeError, RuntimeError):
    parts = []
  if not any(numbers for _, numbers in parts):
    raise DatasetError(f"split {split!r} of {dataset.name} is unknown or empty; it has "
                       + ", ".join(f"{name} ({s.num_examples:,})" for name, s in splits.items()))
  return parts


# --- The demo data set ----------------------------------------------------------------------------

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
  """Ten textures that stay what they are in a small crop, flipped, recoloured or sheared."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(PATTERNS)),
        }))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 8000),
            "validation": self._generate_examples(1, 1000)}

  def _generate_examples(self, seed, count):
    rng = np.random.default_rng(seed)
    for i in range(count):
      if i % 1000 == 0:
        print(f"Drawing the demo's pictures: {i:,} of {count:,}", flush=True)
      label = list(PATTERNS)[i % len(PATTERNS)]
      yield i, {"image": _draw_pattern(rng, PATTERNS[label]), "label": label}


def _draw_pattern(rng, pattern):
  """uint8 [H, W, 3]: a texture of random scale, phase, angle and colours, in uneven light."""
  H, W = rng.integers(80, 144, 2)
  y, x = np.mgrid[:H, :W]
  if pattern is None:
    coarse = rng.standard_normal((7, 7, 1))
    mask = tf.image.resize(coarse, (H, W), "bicubic").numpy()[..., 0] > 0
  else:
    angle, period = rng.uniform(-0.2, 0.2), rng.uniform(14, 24)
    u = (np.cos(angle) * x - np.sin(angle) * y) / period + rng.uniform()
    v = (np.sin(angle) * x + np.cos(angle) * y) / period + rng.uniform()
    mask = pattern(u, v)
  colors = rng.uniform(0, 255, (2, 3))
  while abs(colors[0] - colors[1]).mean() < 100:
    colors = rng.uniform(0, 255, (2, 3))
  light = 1 + rng.uniform(-0.3, 0.3) * (x / W - 0.5) + rng.uniform(-0.3, 0.3) * (y / H - 0.5)
  noise = rng.normal(0, rng.uniform(3, 12), (H, W, 3))
  image = np.where(mask[..., None], *colors) * light[..., None] + noise
  return image.clip(0, 255).astype(np.uint8)


# --- Measuring itself -----------------------------------------------------------------------------


def main(argv):
  if argv[1:]:
    sys.exit(f"Error: {' '.join(argv[1:])}: expected flags only, such as --dataset=patterns")
  dataset = open_dataset(FLAGS.dataset, FLAGS.data_dir, prepare=True, manual_dir=FLAGS.manual_dir)
  splits = dataset.info.splits
  print(f"{FLAGS.dataset} is prepared: "
        + ", ".join(f"{name} {s.num_examples:,}" for name, s in splits.items()))
  for note in notes(dataset):
    print(note)
  if FLAGS.prepare_only or "label" not in dataset.info.features:
    return
  split = FLAGS.split or ("train" if "train" in splits else list(splits)[0])
  kwargs = dict(image_size=FLAGS.image_size, skip_bad_images=FLAGS.skip_bad_images)

  started, B = time.time(), FLAGS.batch_size
  batch = next(train_batches(dataset, split, B, dtype="float32", **kwargs))
  print(f"First training batch after {time.time() - started:.1f} s.")
  captions = [", ".join(f"{p:.2f} {name}" for p, name in
                        sorted(zip(label, class_names(dataset)))[::-1] if p >= 0.005)
              for label in batch["labels"][:16]]
  augment.draw_grid(FLAGS.out, np.uint8((batch["images"][:16] + 1) * 127.5), captions)
  print(f"Wrote {FLAGS.out}, training images as the model sees them. Measuring ...", flush=True)

  limit = read_records(dataset, split).take(4 * B).map(record_reader(dataset)).ignore_errors()
  limit = limit.cache().repeat().enumerate().map(  # in memory, after the first: not the disk's
      lambda i, record: decode_random_crop(record[0], seed_for("crops", 0, i))[0, 0, 0],
      num_parallel_calls=THREADS).ignore_errors().batch(B)
  iterators = {"decode-and-crop alone": limit.prefetch(2).as_numpy_iterator(),
               "training": train_batches(dataset, split, B, **kwargs),
               "evaluation": eval_batches(dataset, split, B, passes=10 ** 6, **kwargs)}
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
  rates = {name: np.median(values) for name, values in rates.items()}
  for name, rate in rates.items():
    print(f"{name:22} {rate:8,.0f} images/s  {rate / rates['decode-and-crop alone']:.2f} of the "
          f"limit  {1000 * os.cpu_count() / rate:.2f} core-milliseconds an image")
  print(f"Training: feeds {rates['training']:,.0f} images/s on this host, {os.cpu_count()} cores.")


if __name__ == "__main__":
  FLAGS = flags.FLAGS
  flags.DEFINE_string("dataset", "patterns", "TFDS name, patterns, or the path of a folder.")
  flags.DEFINE_string("data_dir", None, "Where TFDS keeps data sets.")
  flags.DEFINE_string("manual_dir", None, "The folder of archives to prepare the data set from.")
  flags.DEFINE_bool("prepare_only", False, "Prepare the data set and stop.")
  flags.DEFINE_string("split", None, "What to read; by default train, or what there is.")
  flags.DEFINE_integer("batch_size", 128, "Images per batch.", 1)
  flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
  flags.DEFINE_bool("skip_bad_images", False, "Leave out records that cannot be used.")
  flags.DEFINE_integer("rounds", 5, "Measurements of each pipeline, in turn; the median counts.", 1)
  flags.DEFINE_integer("batches", 10, "Batches per measurement.", 1)
  flags.DEFINE_string("out", "batch.png", "Where the picture of a batch goes.")
  try:
    app.run(main)
  except DatasetError as error:
    sys.exit(f"Error: {error}")
