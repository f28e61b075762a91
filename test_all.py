"""Tests of everything, against values by hand or in float64: `python test_all.py [Case[.test]]`."""

import collections
import contextlib
import functools
import gc
import importlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from unittest import mock

from absl import flags
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized

CACHE = tempfile.TemporaryDirectory()  # of what XLA compiles: many tests run the same few programs
os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import jax

jax.config.update("jax_num_cpu_devices", 8)  # simulated; before anything uses them

import jax.numpy as jnp
import numpy as np
import optax
import tensorflow as tf
import tensorflow_datasets as tfds

import augment
import input_pipeline as inputs
import model
import train

HERE = os.path.dirname(os.path.abspath(__file__))
temporary_folder, patch = tempfile.TemporaryDirectory, mock.patch.object
cases = parameterized.parameters  # a test for each
close, same = np.testing.assert_allclose, np.testing.assert_array_equal
default_rng = np.random.default_rng
TINY = model.Config("mu/8", 16, num_classes=3, dtype="float32")
IMAGES = default_rng(1).uniform(-1, 1, (3, 16, 16, 3))  # what TINY takes


def shardings(devices=8):
  return train.make_shardings(jax.devices()[:devices])


def shapes_of(config):
  return {name: shape for name, (shape, _) in model.parameter_table(config).items()}


def random_params(seed=0, config=TINY):
  """Parameters that are nowhere zero, so that every one of them matters."""
  rng = default_rng(seed)
  return model.unflatten({name: np.float32(rng.normal(0, 0.3, shape))
                          for name, shape in shapes_of(config).items()})


# --- model.py ---


def numpy_forward(p, images):
  """The ViT in float64, written from the report."""
  f = {name: np.asarray(array, np.float64) for name, array in model.flatten(p).items()}
  dense = lambda name, x: x @ f[f"{name}/kernel"] + f[f"{name}/bias"]

  def norm(name, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * f[f"{name}/scale"] + f[f"{name}/bias"]

  P, _, _, D = f["embedding/kernel"].shape
  omega = np.array([10000 ** (-i / (D // 4 - 1)) for i in range(D // 4)])
  tokens, side = [], images.shape[1] // P
  for row, column in itertools.product(range(side), range(side)):
    pixels = images[:, row * P:(row + 1) * P, column * P:(column + 1) * P]
    position = np.concatenate([g(x * omega) for x in (column, row) for g in (np.sin, np.cos)])
    if "pos_embedding" in f:
      position = f["pos_embedding"][0, row * side + column]
    token = np.einsum("bijc,ijcd->bd", pixels, f["embedding/kernel"])
    tokens.append(token + f["embedding/bias"] + position)
  x = np.stack(([0 * tokens[0] + f["cls"][0, 0]] if "cls" in f else []) + tokens, 1)
  for i in range(sum(name.endswith("/query/bias") for name in f)):
    block = f"Transformer/encoderblock_{i}"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    y = norm(f"{block}/LayerNorm_0", x)
    q, k, v = (np.einsum("bld,dnh->bnlh", y, f[f"{attention}/{s}/kernel"])
               + f[f"{attention}/{s}/bias"][:, None] for s in ("query", "key", "value"))
    probs = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3]))
    y = probs / probs.sum(-1, keepdims=True) @ v
    x = x + np.einsum("bnlh,nhd->bld", y, f[f"{attention}/out/kernel"])
    x = x + f[f"{attention}/out/bias"]
    y = dense(f"{block}/MlpBlock_0/Dense_0", norm(f"{block}/LayerNorm_1", x))
    y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y ** 3)))
    x = x + dense(f"{block}/MlpBlock_0/Dense_1", y)
  x = norm("Transformer/encoder_norm", x)
  x = x[:, 0] if "cls" in f else x.mean(1)
  return dense("head", np.tanh(dense("pre_logits", x)) if "pre_logits/kernel" in f else x)


class ModelTest(parameterized.TestCase):

  def test_published_counts(self):
    for fields, count in (({}, 22_122_472), ({"pool": "cls"}, 22_122_856),
                          ({"posemb": "learned"}, 22_197_736), ({"head": "linear"}, 21_974_632)):
      shapes = shapes_of(model.Config(**fields))
      self.assertEqual(sum(map(math.prod, shapes.values())), count)

  PUBLISHED = """
      embedding/kernel 16,16,3,384 lecun 768
      embedding/bias 384 0
      pos_embedding 1,196,384 normal 384
      cls 1,1,384 0
      @LayerNorm_[01]/scale 384 1
      @LayerNorm_[01]/bias 384 0
      @MultiHeadDotProductAttention_0/(query|key|value)/kernel 384,6,64 xavier 768
      @MultiHeadDotProductAttention_0/(query|key|value)/bias 6,64 0
      @MultiHeadDotProductAttention_0/out/kernel 6,64,384 xavier 768
      @MultiHeadDotProductAttention_0/out/bias 384 0
      @MlpBlock_0/Dense_0/kernel 384,1536 xavier 1920
      @MlpBlock_0/Dense_0/bias 1536 normal 1e12
      @MlpBlock_0/Dense_1/kernel 1536,384 xavier 1920
      @MlpBlock_0/Dense_1/bias 384 normal 1e12
      Transformer/encoder_norm/scale 384 1
      Transformer/encoder_norm/bias 384 0
      pre_logits/kernel 384,384 lecun 384
      pre_logits/bias 384 0
      head/kernel 384,1000 0
      head/bias 1000 0""".replace("@", "Transformer/encoderblock_([0-9]|1[01])/")

  def test_published_parameters(self):
    """The last number of a row is fan-in, the sum of both fans, or 1 / variance."""
    params = model.flatten(model.init_params(0, model.Config(posemb="learned", pool="cls")))
    self.assertLen(params, 10 + 12 * 16)  # all that the table describes
    rows = [line.split() for line in self.PUBLISHED.splitlines()[1:]]
    for name, x in params.items():
      (_, shape, kind, *n), = (row for row in rows if re.fullmatch(row[0], name))
      self.assertEqual((",".join(map(str, x.shape)), x.dtype), (shape, jnp.float32), name)
      if kind in "01":
        same(x, float(kind), name)
        continue
      n, largest = float(*n), abs(x).max()
      std = math.sqrt((2 if kind == "xavier" else 1) / n)
      close(x.std(), std, rtol=4 / math.sqrt(2 * x.size), err_msg=name)
      if kind == "xavier":  # uniform
        self.assertBetween(largest / math.sqrt(6 / n), 0.999, 1.000001, name)
      elif kind == "lecun":  # normal, cut at two standard deviations, then rescaled
        close(largest, 2 * std / 0.87962566, rtol=0.01, err_msg=name)

  @cases(
      ("mu", 32, 1, 128, 2), ("Ti", 192, 12, 768, 3), ("S", 384, 12, 1536, 6),
      ("M", 512, 12, 2048, 8), ("B", 768, 12, 3072, 12), ("L", 1024, 24, 4096, 16),
      ("H", 1280, 32, 5120, 16))
  def test_variants(self, name, D, blocks, M, N):
    shapes = shapes_of(model.Config(f"{name}/32"))
    block = "Transformer/encoderblock_0/"
    self.assertLen(shapes, 8 + 16 * blocks)
    self.assertEqual((shapes[block + "MlpBlock_0/Dense_0/kernel"], shapes["embedding/kernel"],
                      shapes[block + "MultiHeadDotProductAttention_0/query/kernel"]),
                     ((D, M), (32, 32, 3, D), (D, N, D // N)))

  def test_an_array_depends_on_seed_and_name_only(self):
    one, other, again = (model.flatten(model.init_params(seed, model.Config("mu/16", *more)))
                         for seed, *more in ((1, 32), (1, 64, "learned", "cls"), (2, 32)))
    for name, x in one.items():
      same(x, other[name], name)
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    for x in (one[name.replace("query", "key")], again[name]):
      self.assertGreater(abs(x - one[name]).max(), 0.01)

  @parameterized.product(posemb=["sincos2d", "learned"], pool=["gap", "cls"],
                         head=["mlp", "linear"])
  def test_forward_is_the_reports(self, **kwargs):
    config = TINY._replace(**kwargs)
    params = random_params(config=config)
    logits = model.forward(params, IMAGES, config)
    self.assertEqual((logits.shape, logits.dtype), ((3, 3), jnp.float32))
    close(logits, numpy_forward(params, IMAGES), rtol=2e-4, atol=2e-4)
    rounded = model.forward(params, IMAGES, config._replace(dtype="bfloat16"))
    self.assertEqual(rounded.dtype, jnp.float32)
    close(rounded, logits, atol=0.05)
    self.assertGreater(abs(rounded - logits).max(), 1e-6)

  @parameterized.product(dtype=[jnp.float32, jnp.bfloat16], equations=[
      ("bld,dnh->blnh", "blnh,dnh->bld", "bld,blnh->dnh"),
      ("blnh,nhd->bld", "bld,nhd->blnh", "blnh,bld->nhd")])
  def test_dense_and_its_gradients(self, dtype, equations):
    """In the type of x; parameters' gradients are float32, and not rounded on their way."""
    rng, sizes = default_rng(0), dict(b=2, l=5, d=7, n=3, h=4)
    x, w, g = (rng.normal(size=[sizes[c] for c in s]) for s in re.split(",|->", equations[0]))
    p = {"kernel": jnp.float32(w), "bias": jnp.zeros(g.shape[2:])}
    x, w, g = (jnp.asarray(a, dtype) for a in (x, w, g))  # rounded inputs, exact products
    out, pull = jax.vjp(functools.partial(model.dense, equations[0]), p, x)
    grads, x_grad = pull(g)
    x64, w64, g64 = map(np.float64, (x, w, g))
    y64, dx64, dw64 = map(np.einsum, equations, (x64, g64, x64), (w64, w64, g64))
    for got, want, of in ((out, y64, dtype), (x_grad, dx64, dtype),
                          (grads["kernel"], dw64, jnp.float32),
                          (grads["bias"], g64.sum((0, 1)), jnp.float32)):
      self.assertEqual(got.dtype, of)
      close(np.float64(got), want, atol=1e-5, rtol=1e-5 if of == jnp.float32 else 2 ** -8)

  def test_layer_norm(self):
    scale, bias, *x = default_rng(0).normal(size=(5, 8))
    x *= np.array([1, 30, 1e-3])[:, None]  # in the last, eps = 1e-6 counts
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    got = model.layer_norm({"scale": scale, "bias": bias}, jnp.float32(x))
    close(got, expected * scale + bias, rtol=1e-5, atol=1e-5)

  @cases(4, 5)
  def test_fused_attention(self, L):
    q, k, v, g = np.float32(default_rng(0).normal(size=(4, 2, L, 3, 8)))
    fused = functools.partial(model.fused_attention, implementation="xla")
    (got, pull), (expected, pull_plain) = (
        jax.vjp(f, q, k, v) for f in (fused, model.plain_attention))
    for x, y in zip((got, *pull(g)), (expected, *pull_plain(g)), strict=True):
      close(x, y, atol=1e-5)

  @cases(("gap", "bfloat16", [4]), ("cls", "bfloat16", [6]), ("gap", "float32", []))
  def test_gpus_use_it(self, pool, dtype, expected):
    config, lengths = TINY._replace(pool=pool, dtype=dtype), []
    params, xla = random_params(config=config), jax.nn.dot_product_attention
    def cudnn(q, k, v, *, implementation, **kwargs):
      self.assertEqual((implementation, q.dtype), ("cudnn", jnp.bfloat16))
      lengths.append(q.shape[1])
      return xla(q, k, v, **kwargs)
    with patch(jax.nn, "dot_product_attention", cudnn), \
        patch(jax, "default_backend", lambda: "gpu"):
      close(model.forward(params, IMAGES, config), numpy_forward(params, IMAGES), atol=0.05)
    self.assertEqual(lengths, expected)

  @cases("float32", "bfloat16")
  def test_float32_means_float32(self, dtype):
    """No CPU's result shows it: TPUs and recent GPUs round factors of products, but for HIGHEST."""
    loss = functools.partial(train.loss_fn, config=TINY._replace(dtype=dtype))
    batch = {"images": np.float32(IMAGES), "labels": np.ones((3, 3), np.float32)}
    text = jax.jit(jax.value_and_grad(loss)).lower(random_params(), batch).as_text()
    self.assertNotIn("convolution", text)
    found = re.findall(
        r"dot_general .* = \[(\w+), .* : \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", text)
    exact = [row for row in found if row == ("HIGHEST", "f32", "f32")]
    # Forward and two derivatives of q, k, v, out, Dense_0, Dense_1, q k^T, probs v, pre_logits and
    # head (always float32); two of patches.
    self.assertEqual((len(exact), len(found)), (32, 32) if dtype == "float32" else (6, 32))

  @cases(("variant", "XL/16", "one of.*mu"), ("variant", "S/0", "such as S/16"),
         ("image_size", 225, "a multiple of"), ("image_size", 8, "a multiple"),
         ("pool", "max", "gap or cls"))
  def test_errors(self, field, value, message):
    with self.assertRaisesRegex(model.WeightsError, f"--{field}={value}: .*{message}"):
      model.parameter_table(model.Config(**{field: value}))


# --- The method: schedule, optimiser, step, evaluation ---


def tiny_batch(size=16, seed=0, config=TINY):
  rng, I = default_rng(seed), config.image_size
  return {"images": np.float32(rng.uniform(-1, 1, (size, I, I, 3))),
          "labels": np.float32(rng.dirichlet(np.ones(config.num_classes), size))}


def train_steps(batches, devices=8, **settings):
  """The metrics of a step on each batch, {name: list}, and the last state."""
  replicated, by_rows = shardings(devices)
  init, step = train.make_training(TINY, replicated, by_rows, 150, train.Settings(**settings))
  state, history = jax.device_put(init(random_params()), replicated), collections.defaultdict(list)
  for batch in batches:
    before, (state, metrics) = state, step(state, jax.device_put(batch, by_rows))
    assert all(x.is_deleted() for x in jax.tree.leaves(before))  # the step reuses its memory
    for name, x in metrics.items():
      history[name].append(x.item())
  return history, jax.device_get(state)


def numpy_loss(logits, labels):
  return -(labels * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)


def norm(tree):
  return math.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(tree)))


class MethodTest(parameterized.TestCase):

  def test_the_defaults_are_the_paper(self):
    expected = dict(
        epochs=90, batch_size=1024, dataset="imagenet2012", train_split="train[:99%]",
        variant="S/16", image_size=224, posemb="sincos2d", pool="gap", head="mlp",
        randaug_layers=2, randaug_magnitude=10, mixup=0.2, lr=1e-3, weight_decay=1e-4,
        warmup_steps=10_000, grad_clip_norm=1, dtype="bfloat16", seed=0, init=None)
    self.assertEqual({name: flags.FLAGS[name].default for name in expected}, expected)
    self.assertEqual(train.flag_values(but=train.NOT_RECIPE).keys(), expected.keys())
    self.assertEqual(train.flag_values().keys() & train.OWN, {
        "workdir", "data_dir", "allow_changes", "coordinator", "num_processes", "process_id"})
    flags.DEFINE_bool("fork", False, "", module_name="train")  # behind all others
    self.addCleanup(delattr, flags.FLAGS, "fork")
    self.assertIn("fork", train.flag_values(but=train.NOT_RECIPE))
    expected["grad_accum"] = 1
    # Everything else with a default has the same one.
    names = {"mixup_p": "mixup", "num_layers": "randaug_layers", "magnitude": "randaug_magnitude"}
    for function in (model.Config, train.Settings, inputs.train_batches,
                     inputs.eval_batches, augment.train_image, augment.eval_image,
                     augment.rand_augment):
      for name, p in inspect.signature(function).parameters.items():
        if p.default is not p.empty and (name := names.get(name, name)) in expected:
          self.assertEqual(p.default, expected[name], f"{name} of {function}")
    self.assertEqual(inspect.signature(augment.mixup).parameters["p"].default, 0.2)
    for flag in ("--lr=-1", "--posemb=none", "--randaug_magnitude=21", f"--seed={2 ** 32}"):
      with flagsaver.flagsaver(), self.assertRaises(flags.IllegalFlagValueError):
        flags.FLAGS(["train.py", flag])

  def test_flags_reach_what_they_are_for(self):
    class Reached(Exception):
      pass
    numbers = numbers_dataset()
    with temporary_folder() as root, flagsaver.flagsaver(), printed(), \
        patch(train, "listen_for_signals"), patch(inputs, "open_dataset", lambda *_: numbers), \
        patch(train, "make_optimizer", wraps=train.make_optimizer) as optimizer, \
        patch(train, "make_training", wraps=train.make_training) as training, \
        patch(model, "init_params", return_value={"kernel": np.zeros(1)}) as init, \
        patch(augment, "train_image") as image, \
        patch(inputs, "train_batches", side_effect=Reached) as batches:
      flags.FLAGS(f"""train.py --train_split=train[:80%] --batch_size=16 --epochs=7 --lr=0.5
          --warmup_steps=5 --weight_decay=0.25 --grad_clip_norm=3 --randaug_layers=1
          --randaug_magnitude=4 --mixup=0.3 --variant=mu/8 --image_size=24 --posemb=learned
          --pool=cls --head=linear --seed=6 --dtype=float32 --grad_accum=2 --eval=train
          --workdir={root}/run""".split())
      self.assertRaises(Reached, train.main, ["train.py"])
      batches.call_args.args[3](b"bytes", (6, 1))
    config = model.Config("mu/8", 24, "learned", "cls", "linear", 3, "float32")
    settings = train.Settings(lr=0.5, weight_decay=0.25, grad_clip_norm=3, warmup_steps=5,
                              grad_accum=2)
    for stand_in, function, expected in (
        (optimizer, train.make_optimizer, dict(settings=settings)),
        (init, model.init_params, dict(seed=6, config=config)),
        (training, train.make_training,  # 7 * 40 / 16 = 17.5 steps
         dict(config=config, total_steps=18, settings=settings)),
        (image, augment.train_image, dict(image_bytes=b"bytes", seed=(6, 1), image_size=24,
                                          randaug_layers=1, randaug_magnitude=4)),
        (batches, inputs.train_batches, dict(
            dataset=numbers, split="train[:80%]", batch_size=16, start_step=0, mixup_p=0.3,
            dtype="float32", seed=6, process_index=0, process_count=1))):
      call = inspect.signature(function).bind(
          *stand_in.call_args.args, **stand_in.call_args.kwargs).arguments
      self.assertEqual(call | expected, call)

  def test_schedule(self):
    def schedule(warmup, total):
      with patch(train, "make_optimizer", wraps=train.make_optimizer) as make:
        train.make_training(TINY, *shardings(), total, train.Settings(warmup_steps=warmup))
      return make.call_args.args[0]
    total = round(90 * 1_268_355 / 1024)
    self.assertEqual(total, 111_477)
    rate = schedule(10_000, total)
    for step, factor in ((0, 0), (1, 1e-4), (5_000, 0.5), (10_000, 1), (total, 0),
                         (10_000 + 101_477 / 2, 0.5), (10_000 + 101_477 / 4, 0.8535534)):
      self.assertAlmostEqual(float(rate(step)), factor, delta=2e-7, msg=step)
    self.assertEqual(float(schedule(0, 10)(0)), 1)

  def test_three_updates_against_float64(self):
    """Clipping, Adam, decay that the rate does not multiply, and the schedule."""
    rng = default_rng(0)
    params = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3),
              "scale": rng.normal(size=2)}
    params, factors = jax.tree.map(np.float32, params), [0.0, 0.5, 1.0]
    tx = train.make_optimizer(lambda step: jnp.array(factors)[step],
                              train.Settings(lr=0.01, weight_decay=0.1, grad_clip_norm=1.0))
    state, expected = tx.init(params), jax.tree.map(np.float64, params)
    mu, nu = (jax.tree.map(np.zeros_like, expected) for _ in range(2))
    for t, size in enumerate((10.0, 0.01, 3.0), 1):  # norm above, below and above 1
      grads = jax.tree.map(lambda x: np.float32(size * rng.normal(size=x.shape)), params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      for name, g in grads.items():
        g = g.astype(np.float64) * min(1, 1 / norm(grads))
        mu[name] = 0.9 * mu[name] + 0.1 * g
        nu[name] = 0.999 * nu[name] + 0.001 * g ** 2
        step = mu[name] / (1 - 0.9 ** t) / (np.sqrt(nu[name] / (1 - 0.999 ** t)) + 1e-8)
        decay = 0.1 * (name == "kernel") * expected[name]
        expected[name] -= factors[t - 1] * (0.01 * step + decay)
        mu[name] = np.float64(jnp.asarray(mu[name], jnp.bfloat16))  # how it is stored
      self.assertEqual(norm(updates) == 0, t == 1)  # the first rate is 0
    for name, x in params.items():
      close(x, expected[name], atol=2e-4, err_msg=name)
    adam = next(s for s in state if hasattr(s, "mu"))
    for name, x in params.items():
      self.assertEqual((adam.mu[name].dtype, adam.nu[name].dtype), (jnp.bfloat16, jnp.float32))
      close(np.float64(adam.mu[name]), mu[name], atol=2e-3)
      close(adam.nu[name], nu[name], rtol=1e-5)

  def test_devices_and_accumulation_change_nothing(self):
    batches = [tiny_batch(seed=seed) for seed in range(3)]
    one, state = train_steps(batches, 1, warmup_steps=2)
    params, flat = random_params(), model.flatten(state["params"])
    grads = jax.grad(lambda p: optax.softmax_cross_entropy(
        model.forward(p, batches[0]["images"], TINY), batches[0]["labels"]).sum() / 16)(params)
    loss = numpy_loss(numpy_forward(params, batches[0]["images"]), batches[0]["labels"]).mean()
    first = dict(loss=loss, grad_norm=norm(grads), param_norm=norm(params))
    for name, value in first.items():
      self.assertAlmostEqual(one[name][0], value, delta=1e-4, msg=name)
    close(one["learning_rate"], [0, 5e-4, 1e-3], rtol=1e-6)
    close(one["param_norm"][2], norm(state["params"]), rtol=1e-6)  # of after the update
    self.assertEqual(state["step"], 3)
    other, state = train_steps(batches, 8, warmup_steps=2, grad_accum=2)
    for name in first:
      close(other[name], one[name], rtol=2e-5, err_msg=name)
    for name, x in model.flatten(state["params"]).items():
      close(x, flat[name], atol=5e-4, err_msg=name)

  @cases(1, 2)
  def test_what_a_fork_adds_reaches_the_loss(self, grad_accum):
    def loss_fn(params, batch, config, settings):  # every weight with its own image
      product = batch["weights"][:, 0] * batch["images"].mean((1, 2, 3)) * settings.lr
      return product.mean() + 0 * params["head"]["bias"].sum()
    batch = tiny_batch() | {"weights": default_rng(5).normal(size=(16, 2))}
    with patch(train, "loss_fn", loss_fn):
      history, _ = train_steps([batch], grad_accum=grad_accum, warmup_steps=0, lr=0.25)
    expected = (batch["weights"][:, 0] * batch["images"].mean((1, 2, 3))).mean() / 4
    close(history["loss"], expected, atol=1e-6)

  def test_a_fork_splits_the_state(self):
    """As ZeRO-1 does: one function says how it lies; step and saving follow."""
    def zero(state, replicated, by_rows):
      return jax.tree.map(lambda x: by_rows if x.ndim and x.shape[0] % 8 == 0 else replicated, state)
    whole, expected = train_steps([tiny_batch()], warmup_steps=0)
    replicated, by_rows = shardings()
    with patch(train, "state_shardings", zero), temporary_folder() as root:
      init, step = train.make_training(TINY, replicated, by_rows, 150,
                                       train.Settings(warmup_steps=0))
      state = init(random_params())
      state = jax.device_put(state, zero(state, replicated, by_rows))
      state, _ = step(state, jax.device_put(tiny_batch(), by_rows))
      split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
      self.assertGreater(len(split), 30)
      train.save_checkpoint(root, state, TINY, {"label_names": []}, None).result()
      arrays = model.read_npz(train.checkpoint_path(root, 1))
    for name, x in model.flatten(expected).items():
      close(np.float64(arrays[name]), np.float64(x), atol=5e-4, err_msg=name)

  def test_eval_step(self):
    config, (replicated, by_rows) = TINY._replace(num_classes=7), shardings()
    params, batch = random_params(config=config), tiny_batch(8, 3, config)
    logits = numpy_forward(params, batch["images"])
    labels, best = np.zeros((8, 7), np.float32), logits.argsort(1)[:, ::-1]
    for row, ranks in enumerate(([0], [1], [4], [5, 6], [0, 3, 5], [2, 6], [], [0])):
      labels[row, best[row, ranks]] = 1  # the right answers' ranks among the predictions
    batch |= {"labels": labels, "mask": np.arange(8) < 7}
    metrics = train.make_eval_step(config, replicated, by_rows)(
        params, jax.device_put(batch, by_rows))
    loss = numpy_loss(logits[:6], labels[:6] / labels[:6].sum(1, keepdims=True)).sum()
    for name, expected in dict(count=6, top1=2, top5=5, loss=loss).items():
      self.assertAlmostEqual(metrics[name].item(), expected, delta=1e-4, msg=name)

  def test_evaluate(self):
    def eval_step(params, batch):
      return {"count": batch["mask"].sum(), "top1": params, "top5": 2 * params, "loss": 3 * params}
    evals = {"val": lambda: ({"mask": np.arange(8) < count} for count in (8, 6, 2))}
    clock = iter(range(0, 1000, 20))
    with printed() as out, patch(time, "perf_counter", lambda: next(clock)):
      results = train.evaluate(jnp.float32(2), evals, eval_step, shardings()[1], {"val": 18})
    self.assertEqual(results, {"val/count": 16, "val/top1": 37.5, "val/top5": 75,
                               "val/loss": 1.125})
    # After 20 s nothing; after 40 s, 16 of 18 rows: 5 s for two more.
    self.assertRegex(out.getvalue(), "^  val        16 of 18 images, 5 s left\n  val  .*top-1.*\n$")
    with self.assertRaisesRegex(train.UserError, "--eval=none: none of its images has a label"):
      train.evaluate(jnp.float32(0), {"none": lambda: [{"mask": np.zeros(8, bool)}]}, eval_step,
                     shardings()[1])

  def test_gradients_are_added_between_devices_in_float32(self):
    """As XLA's partitioner writes it: later, a CPU's compiler makes float32 of every sum."""
    config, (replicated, by_rows) = TINY._replace(dtype="bfloat16", num_classes=5), shardings()
    init, step = train.make_training(config, replicated, by_rows, 10,
                                     train.Settings(warmup_steps=1))
    state = jax.device_put(init(random_params(config=config)), replicated)
    with temporary_folder() as root:
      step.lower(state, jax.device_put(tiny_batch(config=config), by_rows)).compile(
          compiler_options={"xla_dump_to": root, "xla_dump_hlo_as_text": True,
                            "xla_dump_hlo_pass_re": "spmd-partition.*"})
      name, = (name for name in os.listdir(root)
               if "step" in name and "after_spmd-partitioning" in name)
      with open(f"{root}/{name}") as f:
        sums = re.findall(r" = (.*) all-reduce(?:-start)?\(", f.read())
    counts = collections.Counter(re.findall(r"(\w+)\[", " ".join(sums)))
    # Every gradient and the loss.
    self.assertEqual(counts, {"f32": len(jax.tree.leaves(state["params"])) + 1})

  def test_imports_have_no_effect(self):
    """And a generator that is dropped says nothing."""
    root = write_folder(self.create_tempdir().full_path, {"train/cat/1.jpg": encoded()})
    script = subprocess.run([sys.executable, "-c", f"""if True:
        import sys, jax, model
        try:
          model.load("/nowhere.npz")
        except model.WeightsError:
          assert "tensorflow" not in sys.modules
        import train
        assert not train.FLAGS.is_parsed()
        import jax._src.xla_bridge
        assert not jax._src.xla_bridge.backends_are_initialized()
        import tensorflow.python.eager.context as context
        assert not context.context()._initialized  # with the GPUs it may see
        import input_pipeline as inputs
        batches = inputs.eval_batches(inputs.open_dataset({root!r}), "train", 2)
        next(batches)
        """], cwd=HERE, capture_output=True, text=True)
    self.assertEqual(script.returncode, 0, script.stderr)
    self.assertNotRegex(script.stderr, "ignored|Traceback")


# --- augment.py ---


def numpy_op(name, image, *args):
  """The sixteen operations in float64, as the recipe defines them."""
  x, (H, W, _) = image.astype(np.float64), image.shape
  py, px = np.mgrid[:H, :W]
  blend = lambda a, b: np.clip(a + args[0] * (b - a), 0, 255).astype(np.uint8)

  def sample(sx, sy):  # where each pixel comes from
    sx, sy = (np.copysign(np.floor(abs(c) + 0.5), c).astype(int) for c in (sx, sy))
    inside = (0 <= sx) & (sx < W) & (0 <= sy) & (sy < H)
    return np.where(inside[..., None], image[sy.clip(0, H - 1), sx.clip(0, W - 1)], 128)

  match name:
    case "auto_contrast":
      low, high = x.min((0, 1)), x.max((0, 1))
      stretched = (x - low) * 255 / np.maximum(high - low, 1)
      return np.where(high > low, np.clip(stretched + 1e-9, 0, 255).astype(np.uint8), image)
    case "equalize":
      out = image.copy()
      for c in range(3):
        h = np.bincount(image[..., c].ravel(), minlength=256)
        step = (h.sum() - h[h > 0][-1]) // 255
        if step:
          lut = np.concatenate([[0], ((np.cumsum(h) + step // 2) // step)[:-1]]).clip(0, 255)
          out[..., c] = lut[image[..., c]]
      return out
    case "invert":
      return 255 - image
    case "rotate":
      angle = math.radians(args[0])
      c, s, u, v = math.cos(angle), math.sin(angle), px - (W - 1) / 2, py - (H - 1) / 2
      return sample(c * u - s * v + (W - 1) / 2, s * u + c * v + (H - 1) / 2)
    case "posterize":
      return image >> 8 - args[0] << 8 - args[0]
    case "solarize":
      return np.where(image < args[0], image, 255 - image)
    case "solarize_add":
      return np.where(image < 128, np.minimum(x + args[0], 255), x)
    case "color":
      grey = (x @ [0.2989, 0.5870, 0.1140] / 255 * 255.5).astype(np.uint8)
      return blend(grey[..., None].astype(np.float64), x)
    case "contrast":
      return blend(196.0, x)
    case "brightness":
      return blend(0.0, x)
    case "sharpness":
      smooth = x.copy()
      around = sum(x[i:H - 2 + i, j:W - 2 + j] for i in range(3) for j in range(3))
      smooth[1:-1, 1:-1] = np.floor((around + 4 * x[1:-1, 1:-1]) / 13)
      return blend(smooth, x)
    case "shear_x":
      return sample(px + args[0] * py, py)
    case "shear_y":
      return sample(px, py + args[0] * px)
    case "translate_x":
      return sample(px + args[0], py)
    case "translate_y":
      return sample(px, py + args[0])
    case "cutout":
      v, u = py - args[1][0], px - args[1][1]
      hole = (-args[0] <= v) & (v < args[0]) & (-args[0] <= u) & (u < args[0])
      return np.where(hole[..., None], 128, image)


# What each operation gets at magnitudes 10, 5 and 2, by hand; lengths are for 224 pixels.
ARGUMENTS = dict(
    auto_contrast=None, equalize=None, invert=None, rotate=(30, 15, 6), posterize=(4, 2, 1),
    solarize=(0, 128, 51), solarize_add=(110, 55, 22), color=(1.9, 1.0, 0.46),
    contrast=(1.9, 1.0, 0.46), brightness=(1.9, 1.0, 0.46), sharpness=(1.9, 1.0, 0.46),
    shear_x=(0.3, 0.15, 0.06), shear_y=(0.3, 0.15, 0.06), translate_x=(100, 50, 20),
    translate_y=(100, 50, 20), cutout=(40, 20, 8))
SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


class AugmentTest(parameterized.TestCase):

  def test_by_hand(self):
    """On images of three equal rows, of which the second is checked; halves round away from 0."""
    row, four = [0, 1, 100, 127, 128, 200, 255], [10, 20, 30, 40]
    for op, pixels, expected, *args in (
        ("solarize", row, [255, 254, 155, 128, 127, 55, 0], 0),
        # 196 + 1.9 (x - 196): 13.6, 64.9, 66.8, 203.6
        ("contrast", row, [0, 0, 13, 64, 66, 203, 255], 1.9),
        ("auto_contrast", [50] * 4, [50] * 4), ("equalize", [7] * 4, [7] * 4),
        ("translate_x", four, [20, 30, 40, 128], 0.5),  # 0.5 -> 1, 1.5 -> 2
        ("translate_x", four, [128, 20, 30, 40], -0.5)):  # -0.5 -> -1, 0.5 -> 1, 1.5 -> 2
      image = tf.constant(np.tile(np.array(pixels, np.uint8)[None, :, None], (3, 1, 3)))
      same(getattr(augment, op)(image, *args)[1, :, 0], expected, op)
    square = tf.constant(np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1) * np.ones(3, np.uint8))
    # About the centre, out(x, y) = in(-y, x): the top row is the right column.
    same(augment.rotate(square, 90.0)[..., 0], [[3, 6, 9], [2, 5, 8], [1, 4, 7]])

  @cases(*ARGUMENTS)
  def test_against_definitions(self, op):
    rng, function = default_rng(0), tf.function(getattr(augment, op), jit_compile=True)
    noise = rng.integers(0, 256, (56, 56, 3))
    smooth = tf.image.resize(rng.integers(0, 200, (5, 5, 3)), (56, 56), "bicubic")
    for image, sign in ((noise, 1.0), (noise, -1.0), (smooth, 1.0)):
      image = np.asarray(image).clip(0, 255).astype(np.uint8)
      for value in ARGUMENTS[op] or [None]:
        args = [] if value is None else [value * sign if op in SIGNED else value]
        args += [(50, 11)] if op == "cutout" else []
        given = [*map(tf.constant, args)] if op in (*SIGNED, "cutout") else args
        got = function(tf.constant(image), *given).numpy().astype(int)
        expected = numpy_op(op, image, *args).astype(int)
        differs = (got != expected).any(-1)
        if op in SIGNED:
          self.assertLessEqual(differs.mean(), 0.005)
        elif op in ("auto_contrast", "color", "contrast", "brightness", "sharpness"):
          self.assertLessEqual(abs(got - expected).max(), 1)
          self.assertLess(differs.mean(), 0.05)
        else:
          same(got, expected)

  def test_arguments(self):
    self.assertEqual([op.__name__ for op in augment.arguments(10, 1.0, (3, 4), 224)],
                     "auto_contrast equalize invert rotate posterize solarize solarize_add color "
                     "contrast brightness sharpness shear_x shear_y translate_x translate_y "
                     "cutout".split())
    for i, magnitude in enumerate((10, 5, 2)):
      for size, sign in ((224, 1.0), (112, -1.0)):
        for op, args in augment.arguments(magnitude, sign, (3, 4), size).items():
          name, expected = op.__name__, ()
          if ARGUMENTS[name]:
            expected = ARGUMENTS[name][i] * (sign if name in SIGNED else 1)
            expected = expected / (224 // size) if "late" in name or name == "cutout" else expected
            expected = (expected, (3, 4)) if name == "cutout" else (expected,)
          self.assertLen(args, len(expected), name)
          for got, want in zip(args, expected):
            close(got, want, rtol=1e-6, err_msg=name)
    for magnitude, bits in ((0, 1), (4.9, 1), (20, 8)):
      given = augment.arguments(magnitude, 1.0, (3, 4), 224)
      self.assertEqual(given[augment.posterize], (bits,))

  def test_rand_augment_draws_uniformly(self):
    def op(image, sign, center, number):
      drawn = [number, tf.cast(sign, tf.int32) + 1, center[0] * 8 + center[1]]
      return tf.cast(tf.broadcast_to(tf.stack(drawn), image.shape), tf.uint8)
    ops = tuple(functools.partial(op, number=i) for i in range(16))
    def arguments(magnitude, sign, center, size):
      assert (magnitude, size) == (77, 8)
      return {op: (sign, center) for op in ops}
    with patch(augment, "arguments", arguments):
      def draw(i):
        image = tf.zeros([4, 8, 3], tf.uint8)
        return augment.rand_augment(image, [0, i], 1, 77)[0, 0]
      draws = tf.data.Dataset.range(4800).map(draw)
      draws = np.array(list(draws.as_numpy_iterator()))
    for column, choices in ((0, 16), (2, 4 * 8)):  # the operation, the centre
      counts, mean = np.bincount(draws[:, column], minlength=choices), 4800 / choices
      self.assertLen(counts, choices)
      # Chi square: p < 1e-4.
      self.assertLess(((counts - mean) ** 2 / mean).sum(), {16: 45, 32: 70}[choices])
    self.assertAlmostEqual((draws[:, 1] == 2).mean(), 0.5, delta=0.04)

  def test_rand_augment_applies_its_layers_one_by_one(self):
    image = tf.constant(default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    draws = tf.random.stateless_uniform([2, 4], (5, 6), alg="philox")
    one = augment._layers(image, draws[:1], 10)
    same(augment.rand_augment(image, (5, 6)), augment._layers(one, draws[1:], 10))
    same(augment.rand_augment(image, (5, 6), 0), image)

  def test_mixup(self):
    images = default_rng(0).integers(0, 256, (4, 2, 2, 3)).astype(np.uint8)
    scaled = images / 127.5 - 1
    close(augment.scale(images), scaled, atol=1e-6)
    mixed, labels = augment.mixup(tf.constant(images), tf.eye(4), (3, 4))
    a = labels[0, 0].numpy()
    for got, x in ((labels, np.eye(4)), (mixed, scaled)):
      close(got, a * x + (1 - a) * np.roll(x, 1, 0), atol=1e-6)

  @cases(0.2, 0.01, 0.001)  # with draws below what float32 and float64 hold
  def test_mixup_proportions(self, p):
    def proportion(i):
      images = tf.zeros([2, 1, 1, 3], tf.uint8)
      return augment.mixup(images, tf.eye(2), tf.stack([7, i]), p)[1][0]
    proportions = tf.data.Dataset.range(4000).map(proportion)
    a, b = np.array(list(proportions.as_numpy_iterator())).T
    close(a + b, 1, atol=1e-6)
    self.assertGreaterEqual(a.min(), 0.5)
    beta = default_rng(0).beta(p, p, 20_000)
    for q in (0.1, 0.3, 0.5, 0.7):
      close(np.quantile(a, q), np.quantile(np.maximum(beta, 1 - beta), q), atol=0.03)

  def test_random_crops(self):
    """Area and aspect ratio of the boxes, from pixels that say where they are; a JPEG's, too."""
    y, x = np.mgrid[:200, :250]
    image = np.stack([y, x, (y + x) // 2], -1).astype(np.uint8)
    jpeg, png = tf.io.encode_jpeg(image, quality=100), tf.io.encode_png(image)
    shapes = []
    for i in range(300):
      crop = augment.decode_random_crop(png, (0, i)).numpy()
      self.assertEqual(crop[-1, -1, :2].astype(int).tolist(),  # a box of the image
                       (crop[0, 0, :2].astype(int) + crop.shape[:2] - 1).tolist())
      shapes.append(crop.shape)
      if i < 5:
        close(augment.decode_random_crop(jpeg, (0, i)).numpy().astype(int), crop, atol=5)
    h, w, _ = np.array(shapes).T
    for value, least, most in ((h * w / (200 * 250), (0.049, 0.07), (0.8, 1)),
                               (w / h, (0.74, 0.8), (1.25, 1.36))):
      self.assertBetween(value.min(), *least)
      self.assertBetween(value.max(), *most)

  def test_train_image_truncates_and_flips(self):
    columns = default_rng(0).integers(0, 256, (1, 120, 1)).astype(np.uint8)
    png, flips = tf.io.encode_png(np.tile(columns, (120, 1, 3))), 0
    for i in range(60):
      row = augment.train_image(png, (0, i), 32, 0).numpy()[5, :, 1].astype(int)
      crop = augment.decode_random_crop(png, augment.seed_for("crops", (0, i))).numpy()[0, :, 0]
      # Bilinear without antialiasing: output pixel j reads at (j + 0.5) * width / 32 - 0.5.
      x = ((np.arange(32) + 0.5) * len(crop) / 32 - 0.5).clip(0, len(crop) - 1)
      expected = np.floor(np.interp(x, np.arange(len(crop)), crop) + 1e-4)
      flipped = abs(row - expected).sum() > abs(row[::-1] - expected).sum()
      differs = abs(row[::-1 if flipped else 1] - expected)
      self.assertTrue(differs.max() <= 1 and (differs > 0).mean() < 0.1)
      flips += flipped
    self.assertBetween(flips, 18, 42)

  @cases((30, 40), (41, 33), (224, 224), (301, 300), (57, 500))
  def test_eval_image(self, H, W):
    """Shorter side to 37 = round(32 * 256 / 224) by area means, truncated, central 32 x 32."""
    image = default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
    h, w = (round(side * 37 / min(H, W)) for side in (H, W))

    def area(n_in, n_out):  # the share of each input pixel in each output pixel
      edges, pixels = np.arange(n_out + 1) * n_in / n_out, np.arange(n_in)
      overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
      return overlap.clip(0) * n_out / n_in

    small = np.einsum("yh,xw,hwc->yxc", area(H, h), area(W, w), image.astype(np.float64))
    y, x = (h - 32) // 2, (w - 32) // 2
    got = augment.eval_image(tf.io.encode_png(image), 32).numpy()
    differs = abs(got - np.floor(small + 1e-3)[y:y + 32, x:x + 32])
    # 29.999 in float32 is truncated to 29.
    self.assertTrue(differs.max() <= 1 and (differs > 0).mean() < 0.05)


# --- inputs.py ---


class Numbers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """50 + 13 JPEGs of many shapes; the label is the number modulo 3, "many" are 0 to 2 labels."""
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    label = tfds.features.ClassLabel(names=["zero", "one", "two"])
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(encoding_format="jpeg"), "label": label,
        "many": tfds.features.Sequence(label)}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(50), "validation": self._generate_examples(13)}

  def _generate_examples(self, count):
    rng = default_rng(count)
    for i in range(count):
      image = rng.integers(0, 256, (*rng.integers(20, 60, 2), 3)).astype(np.uint8)
      yield i, {"image": image, "label": i % 3, "many": [[], [i % 3], [0, 2]][i % 3]}


DATA = temporary_folder()


@functools.cache
def numbers_dataset():
  builder = Numbers(data_dir=DATA.name)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
  return builder


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def write_folder(root, files):
  """{"train/cat/1.png": bytes, or where a link points to} -> a folder data set."""
  for name, content in files.items():
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, str):
      os.symlink(content, path)
    else:
      with open(path, "wb") as f:
        f.write(content)
  return root + "/"


def encoded(size=(40, 30), mode="RGB", kind="JPEG", color=None):
  from PIL import Image
  out = io.BytesIO()
  Image.new(mode, size, color).save(out, kind)
  return out.getvalue()


def names_of(records):
  return [os.fsdecode(x["path"].numpy()) + (f"#{x['position']}" if "position" in x else "")
          for x in records]


def stored_records(dataset, split):
  return inputs.read_records(dataset, inputs.split_parts(dataset, split))


class InputTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.numbers = numbers_dataset()

  def train_batches(self, batch_size=8, dataset=None, split="train", layers=0, **kwargs):
    train_image = functools.partial(augment.train_image, image_size=32, randaug_layers=layers)
    kwargs = dict(dtype="float32", seed=3) | kwargs
    return inputs.train_batches(dataset or self.numbers, split, batch_size, train_image,
                                        **kwargs)

  def eval_batches(self, batch_size, dataset=None, split="validation", **kwargs):
    eval_image = functools.partial(augment.eval_image, image_size=16)
    kwargs = dict(dtype="float32") | kwargs
    return inputs.eval_batches(dataset or self.numbers, split, batch_size, eval_image,
                                       **kwargs)

  def refused(self, message):
    return self.assertRaisesRegex(inputs.DatasetError, message)

  @parameterized.product(n=[1, 2, 3], split=["train[:90%]", "validation+train[30%:70%]"])
  def test_processes_read_their_own_shares(self, n, split):
    """Every record of an epoch once and none twice, in an own order, from any start."""
    size = inputs.split_size(self.numbers, split)
    stored, epochs, draws = names_of(stored_records(self.numbers, split)), [], []
    for i in range(n):
      first, last = size * i // n, size * (i + 1) // n
      def stream(seed=3, start=0):
        records = inputs.shuffled_records(self.numbers, split, seed, start, i, n)
        return names_of(records.take(2 * (last - first)))
      with patch(inputs, "window_size", lambda *_: 5):
        records = stream()
        self.assertEqual(stream(start=11)[:-11], records[11:])
        self.assertNotEqual(stream(seed=4), records)
      epochs.append(records[:last - first])
      self.assertCountEqual(epochs[-1], stored[first:last])
      self.assertCountEqual(epochs[-1], records[last - first:])
      self.assertNotIn(epochs[-1], (stored[first:last], records[last - first:]))
      batches = inputs.train_batches(  # of images that show their seeds
          self.numbers, split, 6, lambda _, seed: tf.fill([2, 2, 3], tf.cast(seed[1], tf.uint8)),
          dtype="float32", mixup_p=0, start_step=2, process_index=i, process_count=n)
      draws += [*((next(batches)["images"][:, 0, 0, 0] + 1) * 127.5).round()]
    self.assertCountEqual(sum(epochs, []), stored)
    self.assertCountEqual(draws, range(12, 18))
    if n == 1 and split == "train[:90%]":  # files are shuffled, too
      files = re.findall("-0000(.)-of-", " ".join(epochs[0]))
      self.assertNotEqual(files, sorted(files))

  @cases(("train[:99%]", 110_000, 4096), ("train", 2 ** 17 + 1, 4095), ("train", 2 ** 30, 1),
         ("train", 0, 4096), ("train+test", 2_000_000, 429))  # with as many of 500,000 bytes
  def test_window_size(self, split, size, expected):
    part = lambda size: types.SimpleNamespace(num_examples=1000, num_bytes=1000 * size)
    info = types.SimpleNamespace(splits={"train": part(size), "test": part(500_000)})
    parts = [(name.partition("[")[0], range(7)) for name in split.split("+")]
    self.assertEqual(inputs.window_size(types.SimpleNamespace(info=info), parts), expected)

  def test_splits(self):
    parts = [names_of(stored_records(self.numbers, split))
             for split in ("train[:90%]", "train[90%:]+validation")]
    self.assertEqual([len(part) for part in parts], [45, 18])
    self.assertLen(set(sum(parts, [])), 63)
    for split in ("test", "train[:0]", "train[:101]", "tr ain", "all[:50%]"):
      with self.refused(r"nothing in .*, only \['train', 'validation'\]"):
        inputs.split_size(self.numbers, split)

  def test_a_batch_is_a_function_of_its_number(self):
    batches = take(self.train_batches(layers=2), 14)  # two epochs and a bit
    self.assertEqual(batches[0]["images"].shape, (8, 32, 32, 3))
    self.assertLessEqual(abs(batches[0]["images"]).max(), 1 + 1e-6)
    smallest = {x["labels"][x["labels"] > 0].min() for x in batches}
    self.assertGreater(len(smallest), 7)  # each is mixed in its own proportion
    for start in (3, 13):
      with patch(inputs, "THREADS", 1):
        again = next(self.train_batches(layers=2, start_step=start))
        jax.tree.map(same, batches[start], again)
    images = next(self.train_batches(layers=2, seed=4))["images"]
    self.assertGreater(abs(images - batches[0]["images"]).max(), 0.1)

  def test_processes_mix_in_one_proportion(self):
    proportions = set()
    for i in range(2):
      mixed, plain = (next(self.train_batches(
          start_step=3, process_index=i, process_count=2, mixup_p=p)) for p in (0.2, 0))
      a = (mixed["labels"] * plain["labels"]).sum(1).min()
      for key, x in plain.items():
        close(mixed[key], a * x + (1 - a) * np.roll(x, 1, 0), atol=1e-5)
      proportions.add(round(float(a), 5))
    self.assertLen(proportions, 1)

  def test_images_and_labels_belong_together(self):
    batch, half = (next(self.train_batches(50, mixup_p=0, dtype=dtype))
                   for dtype in ("float32", "bfloat16"))
    self.assertEqual(half["images"].dtype, jnp.bfloat16)
    close(np.float32(half["images"]), batch["images"], atol=2 ** -9)
    records = inputs.shuffled_records(self.numbers, "train", 3).take(50)
    images, labels = zip(*map(inputs.record_parser(self.numbers), records))
    same(batch["labels"], np.eye(3)[np.array(labels)])
    image = augment.train_image(images[7], (3, 7), 32, 0)
    close(batch["images"][7], image.numpy() / 127.5 - 1, atol=1e-6)

  def test_sets_of_labels(self):
    batch, = self.eval_batches(16, label="many")
    read = inputs.record_parser(self.numbers)
    labels = [[[0, 0, 0], [0, 1, 0], [1, 0, 1]][read(record)[1]]
              for record in stored_records(self.numbers, "validation")]
    same(batch["labels"], labels + [[0, 0, 0]] * 3)
    same(batch["mask"], np.arange(16) < 13)  # a row without a label is a row all the same
    info = self.numbers.info
    info = types.SimpleNamespace(splits=info.splits, features=dict(info.features))
    info.features["label"] = info.features["many"]
    with self.refused("many: its label is a set"):
      next(self.train_batches(dataset=types.SimpleNamespace(name="many", info=info)))

  @cases((8, 1), (16, 1), (4, 2), (32, 4), (6, 3), (20, 20))
  def test_evaluation_counts_every_image_once(self, batch_size, n):
    shares = [list(self.eval_batches(batch_size, process_index=i, process_count=n))
              for i in range(n)]  # some have nothing of the last batch, or nothing at all
    self.assertEqual({len(share) for share in shares}, {-(-(-(-13 // n)) // (batch_size // n))})
    rows = {key: np.concatenate([batch[key] for share in shares for batch in share])
            for key in ("images", "labels", "mask")}
    self.assertEqual(rows["images"].shape[1:], (16, 16, 3))
    self.assertEqual((rows["mask"].sum(), rows["labels"][~rows["mask"]].sum()), (13, 0))
    records = map(inputs.record_parser(self.numbers),
                  stored_records(self.numbers, "validation"))
    for image, row, (data, label) in zip(rows["images"][rows["mask"]],
                                         rows["labels"][rows["mask"]], records, strict=True):
      close(image, augment.eval_image(data, 16).numpy() / 127.5 - 1, atol=1e-6)
      same(row, np.eye(3)[label.numpy()])

  @cases((2, 2, {}), (14, 28, {"mixup_p": 0}))
  def test_more_processes_than_can_train(self, n, batch_size, kwargs):
    with self.refused(f"{n} processes are too many for .* batches of {batch_size}: .*--mixup=0"):
      next(self.train_batches(batch_size, split="validation", process_count=n, **kwargs))
    next(self.train_batches(batch_size, process_count=n, mixup_p=0))

  def folder(self, files):
    return write_folder(self.create_tempdir().full_path, files)

  def test_folder_of_any_images(self):
    colors = {  # file: mode and colour of what is in it, the colour that the model sees
        "cat/b.PNG": ("LA", (100, 50), (100, 100, 100)),
        "dog/x.jpg/deep/e.gif": ("RGB", (9, 9, 9), (9, 9, 9)),
        "eel/f.webp": ("RGB", (0, 0, 250), (0, 0, 250)),
        "eel/g\udce9.bmp": ("RGB", (1, 2, 3), (1, 2, 3))}
    files = {f"train/{file}": encoded(mode=mode, color=color, kind={"jpg": "JPEG"}.get(
        file[-3:], file.split(".")[-1])) for file, (mode, color, _) in colors.items()}
    others = """val/cat/n.jpg .git/cat/o.jpg train/.ipynb_checkpoints/p.jpg train/cat/.cache/q.jpg
        train/r.jpg train/cat/s.tif train/cat/._t.jpg __MACOSX/train/u.jpg devkit/data/v.txt
        val/dog/w.jpe val/dog/x.JFIF test/test1/y.jpg"""
    root = self.folder(files | dict.fromkeys(others.split(), encoded()))
    os.makedirs(f"{root}/train/empty")
    with printed() as out:
      data, classes = inputs.open_dataset(root, train_split="train[:75%]"), ("cat", "dog", "eel")
    self.assertRegex(out.getvalue(), r"^3 files are left out, such as .*/(r.jpg|s.tif|v.txt): .*jfif")
    self.assertEqual(inputs.class_names(data), classes)
    with printed():
      self.assertEqual(inputs.class_names(inputs.open_dataset(root)), classes + ("test1",))
    self.assertEqual({split: info.num_examples for split, info in data.info.splits.items()},
                     {"train": 4, "val": 3, "test": 1})
    with self.refused("bad record .*/test/test1/y.jpg: label is none of 3 classes; in a folder, all "
                      "SPLIT/CLASS/ must be as in --train_split; mend"):
      next(self.eval_batches(1, data, "test"))
    next(self.eval_batches(1, data, "val"))
    records = stored_records(data, "train")
    for record, batch in zip(records, self.eval_batches(1, data, "train"), strict=True):
      file = os.path.relpath(os.fsdecode(record["path"].numpy()), f"{root}/train")
      close((batch["images"][0, 8, 8] + 1) * 127.5, colors[file][2], atol=3, err_msg=file)
      same(batch["labels"], [[file.split("/")[0] == name for name in classes]])

  def test_links_and_classes_that_are_numbers(self):
    """A link to a folder above is not followed, another one is; 2 comes before 10."""
    other = self.folder({"a.jpg": encoded(), "cat/d.jpg": encoded()})
    root = self.folder({"train/2/a.jpg": encoded(), "train/10/b.jpg": encoded(), "train/1": other,
                        "train/2/up": "..", "train/10/up": "../.."})
    data = inputs.open_dataset(root)
    self.assertEqual(inputs.class_names(data), ("1", "2", "10"))
    files = [os.path.relpath(name, root) for name in names_of(stored_records(data, "train"))]
    self.assertCountEqual(files, ["train/2/a.jpg", "train/10/b.jpg", "train/1/a.jpg",
                                  "train/1/cat/d.jpg"])
    with patch(os, "scandir", side_effect=PermissionError(13, "Permission denied", "10")):
      with self.refused("Permission denied: '10'"):
        inputs.open_dataset(root)

  def test_folders_have_the_order_of_image_folder(self):
    root = self.folder({f"train/{i % 3}{'ab'[i % 2]}/{i}.jpg": encoded() for i in range(60)})
    data, other = inputs.open_dataset(root), tfds.ImageFolder(root[:-1])
    files = names_of(stored_records(data, "train"))
    self.assertEqual(files, [x["image/filename"].numpy().decode()
                             for x in other.as_dataset(split="train")])
    for file in files[:54]:
      os.remove(file)
    masks = [batch["mask"].sum() for batch in self.eval_batches(4, data, "train[90%:]")]
    self.assertEqual(sum(masks), 6)
    one, two = ([files.index(name) % 30 for name in names_of(
        inputs.shuffled_records(data, "train", 3, 0, i, 2).take(60))] for i in range(2))
    self.assertNotIn(one[:30], (one[30:], two[:30]))  # epochs and processes draw their own orders

  def test_each_epoch_shuffles_a_whole_folder(self):
    files = {f"train/{i % 2}/{i}.jpg": b"" for i in range(10_000)}
    data = inputs.open_dataset(self.folder(files))
    stream = names_of(inputs.shuffled_records(data, "train", 3).take(14_096))
    self.assertLen(set(stream[:10_000]), 10_000)
    both = len({*stream[:4096]} & {*stream[10_000:]})
    self.assertBetween(both, 1500, 1860)  # 4,096 * 4,096 / 10,000 = 1,678 by chance

  def test_fingerprints(self):
    files = {f"{split}/{'ab'[i % 2]}/{i}.jpg": b"" for split in ("train", "val") for i in range(9)}
    def of(files, split="train[:50%]"):
      return inputs.fingerprint(inputs.open_dataset(self.folder(files)), split)
    def moved(old, new):
      return {new if name == old else name: content for name, content in files.items()}
    first = of(files)
    self.assertEqual(first, of(files | {"val/b/more.jpg": b""}))
    self.assertEqual(first, of(dict(reversed(files.items())), "train"))
    for other in (files | {"train/b/more.jpg": b""}, moved("train/a/0.jpg", "train/b/0.jpg"),
                  moved("train/a/0.jpg", "train/a/00.jpg")):
      self.assertNotEqual(first, of(other))
    self.assertNotEqual(first, of(files, "train+val"))
    again = Numbers(data_dir=self.create_tempdir().full_path)  # in one file
    again.download_and_prepare()
    prints = {inputs.fingerprint(data, split) for data, split in (
        (self.numbers, "train[:9]"), (self.numbers, "train"), (self.numbers, "validation"),
        (again, "train"))}
    self.assertLen(prints, 3)

  def palette(colors, kind="BMP"):
    from PIL import Image
    image = Image.new("P", (40, 30), 7)
    image.putpalette([value for i in range(256) for value in (i, i, i + colors & 255)])
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()

  BAD = {
      "text.jpg": b"no image", "cut.jpg": encoded((300, 300))[:400],
      "dangling.jpg": "/nowhere.jpg", "palette.bmp": palette(1),
      "caf\udce9.jpg": b""}  # empty; the name is not UTF-8, but Latin-1

  def test_palettes(self):
    for color, data in ((7, self.GREY), (8, self.COLOR_PNG)):
      same(augment.eval_image(data, 32)[0, 0, 2], color)
    with self.assertRaises(tf.errors.InvalidArgumentError):
      augment.eval_image(self.BAD["palette.bmp"])

  GREY, COLOR_PNG = palette(0), palette(1, "PNG")

  @cases(*BAD)
  def test_bad_images(self, bad):
    good = {f"train/c{i % 2}/{i}.jpg": encoded(color=(40 * i, 0, 0)) for i in range(5)}
    data = inputs.open_dataset(self.folder(good | {f"train/c0/{bad}": self.BAD[bad]}))
    for batches in (*map(self.train_batches, (3, 1), (data, data)),
                    self.eval_batches(4, data, "train")):
      with self.refused(f"bad record .*/c0/{bad}: .*mend".replace("\udce9", r"\\xe9")):
        take(batches, 6)

  @cases(("data", 0.5), ("length", 0), ("data", 0.1), ("length", 0.5))
  def test_damaged_files(self, kind, place):
    """What reading itself stumbles over accuses no record, and asks to remove none."""
    builder = Numbers(data_dir=self.create_tempdir().full_path)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    for split in ("train", "validation"):
      path = sorted(builder.data_path.glob(f"*{split}*"))[2]
      data, starts = bytearray(path.read_bytes()), [0]
      while starts[-1] < len(data):  # length, its checksum, data, their checksum
        starts.append(starts[-1] + int.from_bytes(data[starts[-1]:starts[-1] + 8], "little") + 16)
      start = starts[int(place * (len(starts) - 1))]
      data[start + (0 if kind == "length" else 100)] ^= 1
      path.write_bytes(data)
    with patch(inputs, "window_size", lambda *_: 5):
      for batches in (self.train_batches(3, builder), self.eval_batches(2, builder)):
        with self.refused("^data cannot be read: corrupted record at [0-9]+.*; prepare or copy"):
          take(batches, 20)

  @cases(4, 1)
  def test_files_that_are_too_short(self, shards):
    builder = Numbers(data_dir=self.create_tempdir().full_path)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    for split, batches in (("train", self.train_batches), ("validation", self.eval_batches)):
      path, length = sorted(builder.data_path.glob(f"*{split}*"))[-1], (
          builder.info.splits[split].shard_lengths[-1])
      data = path.read_bytes()
      for held in (2, 0):
        size = 0
        for _ in range(held):
          size += int.from_bytes(data[size:size + 8], "little") + 16
        path.write_bytes(data[:size])
        with self.refused(f"^{path} holds {held} of {length} records; prepare or copy the data"):
          take(batches(4, builder, split), math.ceil(50 / 4))

  def test_an_error_that_passes(self):
    root = self.folder({f"train/c{i % 2}/{i}.jpg": encoded() for i in range(6)})
    data, bad_record = inputs.open_dataset(root), inputs.bad_record
    os.rename(f"{root}train/c1/3.jpg", f"{root}3.jpg")
    def mended(*arguments):
      os.rename(f"{root}3.jpg", f"{root}train/c1/3.jpg")
      return bad_record(*arguments)
    with patch(inputs, "bad_record", mended):
      with self.refused("^.*/c1/3.jpg; No such file .*; read once more, it was right: start again$"):
        list(self.eval_batches(4, data, "train"))

  def test_dataset_errors(self):
    with temporary_folder() as root, contextlib.chdir(root), printed():
      write_folder(root, {"two/train/a/1.jpg": b"", "flat/train/1.jpg": b""})
      for name, data_dir, prepare, message in (
          ("imagenet2012", root, True, "downloads/manual.*ILSVRC2012_img_train.tar"),
          ("imagenet2012", root, False, 'python -c "import input_pipeline; .*open_dataset'),
          ("./nowhere", root, True, "expected a name in TFDS"), ("./flat", root, True, "no images"),
          ("cifar10:9.9.9", root, True, "9.9.9"), ("two", root, True, "did you mean ./two"),
          ("imagnet2012", root, True, "not found.*Did you mean: imagnet2012 -> imagenet2012"),
          ("patterns", "/dev/null/x", True, "--data_dir=/dev/null/x: .*Not a directory")):
        with self.refused(f"(?s)--dataset={name} .*{message}"):
          inputs.open_dataset(name, data_dir, prepare)
    with self.refused("no image with classes in 'name', but .*'label'"):
      inputs.class_names(self.numbers, "name")
    image, tensor = tfds.features.Image(shape=(8, 8, 1), dtype=np.float32), tfds.features.Tensor(
        shape=(8, 8, 3), dtype=np.uint8)
    for odd in (image, tensor):
      info = types.SimpleNamespace(features={"image": odd, "label": tfds.features.ClassLabel(num_classes=2)})
      with self.refused("odd has no image with classes in 'label', but .*'image'"):
        inputs.class_names(types.SimpleNamespace(name="odd", info=info))
    with patch(type(self.numbers.info), "disable_shuffling", True), printed() as out, \
        patch(tfds, "builder", lambda *_, **__: self.numbers):
      inputs.open_dataset("numbers")
    self.assertIn("numbers was prepared without shuffling", out.getvalue())

  def test_archives_that_are_none(self):
    root = self.folder(dict.fromkeys(
        (f"downloads/manual/ILSVRC2012_img_{name}.tar" for name in ("train", "val")), b"<html>"))
    with self.refused(f"--data_dir={root}: truncated header; .*{root}/downloads/manual"), \
        printed():
      inputs.open_dataset("imagenet2012", root)

  def test_preparing_while_another_process_does(self):
    """Who comes second opens what the first one made. The module may be loaded again."""
    importlib.reload(inputs)
    root, make = self.create_tempdir().full_path, inputs.patterns
    def late(data_dir):
      builder = make(data_dir)
      builder._split_datasets = {"train": itertools.islice(builder._split_datasets["train"], 20)}
      prepare = builder.download_and_prepare
      def fail():
        prepare()
        raise FileExistsError(17, "File exists")
      builder.download_and_prepare = fail
      return builder
    with patch(inputs, "patterns", late), printed() as out:
      dataset = inputs.open_dataset("patterns", root)
    self.assertEqual(inputs.split_size(dataset, "train"), 20)
    self.assertEqual(out.getvalue(), f"Preparing patterns in {root}/patterns/2.0.0 ...\n")
    with self.refused(f"{root}/patterns/2.0.0 has nothing in 'validation', only .*delete it"):
      inputs.split_size(dataset, "validation")


# --- Weights, checkpoints, runs ---

COLORS = ("blue", "green", "red")


def printed():
  return contextlib.redirect_stdout(io.StringIO())


def noise_folder(root):
  """A folder of noise in three classes, which are its mean colours, so that they can be learnt."""
  rng, files = default_rng(0), {}
  for split, count in (("train", 40), ("validation", 13)):
    for i in range(count):
      image = rng.integers(0, 120, (30 + i, 40, 3))
      image[..., i % 3] += 100
      png = tf.io.encode_png(image.astype(np.uint8)).numpy()
      files[f"{split}/{COLORS[2 - i % 3]}/{i}.png"] = png
  return write_folder(f"{root}/data", files)


def run(*arguments):
  """`train.py` with these arguments, in this process: what it printed."""
  with flagsaver.flagsaver(), printed() as out, patch(train, "listen_for_signals"), \
      patch(train.Stop, "number", 0), patch(train.Stop, "then", "now"):
    try:
      assert train.run(flags.FLAGS(["train.py", *arguments])) is None  # exit code 0
    except SystemExit as error:
      out.write(f"\nexit: {error.code}")
  gc.collect()  # a workdir is locked as long as an error keeps frames alive
  return out.getvalue()


def losses(log):
  return dict(re.findall(r"^step (\d+)/.* loss (\S+) ", log, re.M))


def lines_of(workdir):
  with open(f"{workdir}/log.jsonl") as f:
    lines = [json.loads(line) for line in f]
  return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


class Case(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.shared = tempfile.mkdtemp()
    cls.data = noise_folder(cls.shared)

  def setUp(self):
    super().setUp()
    self.root = self.create_tempdir().full_path
    self.workdir = f"{self.root}/run"

  def flags(self, *more):
    return [f"--dataset={self.data}", f"--workdir={self.workdir}", "--variant=mu/8",
            "--image_size=16", "--batch_size=8", "--epochs=4", "--train_split=train",
            "--eval=validation", "--warmup_steps=2", "--dtype=float32", "--log_every=1",
            "--checkpoint_every=5", "--randaug_layers=0", *more]

  def run_it(self, *more):
    return run(*self.flags(*more))

  def refused(self, message, *more):
    line = self.run_it(*more).partition("\nexit: Error: ")[2]
    self.assertRegex(line, message)
    self.assertNotIn("\n", line)
    return line

  def steps(self):
    return [int(path[-12:-4]) for path in train.checkpoints(self.workdir)]

  def arrays(self, workdir=None):
    return model.read_npz(train.checkpoints(workdir or self.workdir)[-1])

  def assert_same_state(self, one, other):
    one, other = self.arrays(one), self.arrays(other)
    for name, x in one.items():
      if name != "recipe":
        same(x, other[name], name)

  def weights(self, of=TINY, change={}, **about):
    """Random weights, some changed, or left out for None: foreign, or of ours with `about`."""
    flat = model.flatten(random_params(config=of)) | change
    prefix = "params/" if about else ""
    np.savez(f"{self.root}/weights.npz", **about, **{
        prefix + name: x for name, x in flat.items() if x is not None})
    return f"{self.root}/weights.npz"


def as_json(value):
  return np.array(json.dumps(value))


class WeightsTest(Case):

  @parameterized.product(posemb=["sincos2d", "learned"], pool=["gap", "cls"],
                         head=["mlp", "linear"], num_classes=[0, 3],
                         flavour=[("", "float32"), ("params/", "bfloat16"),
                                  ("opt/target/", "float16")])
  @mock.patch.dict(model.VARIANTS, two=(16, 2, 32, 2))
  def test_published_files(self, flavour, **fields):
    (prefix, dtype), config = flavour, model.Config("two/8", 16, dtype="bfloat16", **fields)
    flat = {name: x.astype(dtype) for name, x in
            model.flatten(random_params(config=config)).items()}
    more = {"opt/state/step": np.array(3), "extra": np.zeros(2)} if "opt" in prefix else {}
    np.savez(f"{self.root}/w.npz", **more, **{prefix + name: x for name, x in flat.items()})
    params, found, names = model.load(f"{self.root}/w.npz")
    size = 224 if config.posemb == "sincos2d" else 16  # the former does not show it
    self.assertEqual((found, names), (config._replace(image_size=size), ()))
    params = model.flatten(params)
    self.assertEqual(set(params), set(flat))
    for name, x in params.items():
      self.assertEqual(x.dtype, np.float32)
      close(x, flat[name].astype(np.float32), err_msg=name)

  @cases(
      ({}, ""), ({"rope": 0}, "rope"), ({"pool": "max"}, "pool=max"), ({"variant": 8}, ""),
      ({"posemb": "learned"}, "pos_embedding missing"), ({"dtype": "int8"}, "int8"),
      ({"num_classes": 4}, "head/bias float32"))
  def test_what_a_checkpoint_says_of_itself(self, change, message):
    """A field that this code does not know is refused; one that it lacks has its default."""
    said = TINY._replace(image_size=24, pool="gap")  # which no array shows
    fields = said._asdict() | change
    del fields["posemb" if "posemb" not in change else "head"]
    path = self.weights(config=as_json(fields), label_names=np.array(["a", "b", "c"]))
    if not change:
      self.assertEqual(model.load(path)[1:], (said, ("a", "b", "c")))
    else:  # adopted by its shapes, it would be another model
      with self.assertRaisesRegex(model.WeightsError, f"^--.*{path}.*{message}.*$"):
        model.load(path)

  @cases(
      ({"pos_embedding": np.float32(1)}, "is no ViT that"),
      ({"embedding/kernel": np.zeros(3)}, "is no ViT that"),
      # All that is wrong is listed.
      ({"embedding/bias": None, "Transformer/encoder_norm/bias": np.zeros(5, np.float32),
        "surprise": np.zeros(1), "pre_logits/bias": np.zeros(32, np.int32),
        "head/bias": np.float32([0, np.nan, 0])},
       r"encoder_norm/bias float32 \(5,\), expected floats \(32,\).*embedding/bias missing.*"
       r"head/bias not finite.*pre_logits/bias int32 \(32,\), expected floats.*surprise unknown"),
      *(({}, f"--{name}={value} contradicts --init.*, of {name}=", {name: value}) for name, value
        in (("head", "linear"), ("pool", "cls"), ("posemb", "learned"), ("variant", "S/16"),
            ("num_classes", 4))))
  def test_refused_weights(self, change, message, given={}):
    with self.assertRaisesRegex(model.WeightsError, message):
      model.load(self.weights(change=change), **{"image_size": 16} | given)

  def test_blocks_are_counted_where_they_are(self):
    """And not at a head that attends, too."""
    shapes = {name: np.zeros(shape) for name, shape in shapes_of(TINY).items()}
    more = {"MAPHead_0/MultiHeadDotProductAttention_0/query/bias": np.zeros((2, 16)),
            "MAPHead_0/LayerNorm_0/scale": np.zeros(32)}
    self.assertEqual(model.config_of_shapes(shapes | more).variant, "mu/8")

  def test_resample_posemb(self):
    grid = np.array([0, 4, 8, 12], np.float32).reshape(1, 4, 1)
    close(model.resample_posemb(grid, 9)[0, :, 0], [0, 2, 4, 4, 6, 8, 8, 10, 12])
    path = self.weights(config := TINY._replace(posemb="learned"))
    params, other, _ = model.load(path, image_size=24, dtype="float32")
    self.assertEqual(other, config._replace(image_size=24))
    expected = random_params(config=config)["pos_embedding"].mean((0, 1))
    close(params["pos_embedding"][0, 4], expected, atol=1e-6)

  def test_training_and_evaluating_weights(self):
    """Names that are stated, numbers included, are names; without any, positions count."""
    self.run_it("--epochs=12", "--lr=0.01", f"--workdir={self.root}/trained")
    arrays, out = self.arrays(f"{self.root}/trained"), f"{self.root}/w.npz"
    for names in (COLORS, (), tuple("012"), COLORS[1:] + COLORS[:1]):
      np.savez(out, **{name: x for name, x in arrays.items() if names or name[:6] == "params"}
               | ({"label_names": np.array(names)} if names else {}))
      log = self.run_it(f"--init={out}", "--mixup=0", "--epochs=1",
                        f"--workdir={self.root}/{names}")
      if names in (COLORS, ()):
        self.assertRegex(self.run_it("--eval_only", f"--init={out}"), r"top-1 +(9\d|100)\.")
        self.assertLess(float(losses(log)["1"]), 0.5)  # the labels follow the weights
        self.assertEqual(tuple(self.arrays(f"{self.root}/{names}")["label_names"]), COLORS)
      else:
        self.refused(f"--eval=validation has 3 classes, .*'red'.*model 3, .*{names[0]}",
                     "--eval_only", f"--init={out}")
        self.assertRegex(log, f"Starting with a new head: --init has 3 other .*{names[0]}")
        self.assertAlmostEqual(float(losses(log)["1"]), math.log(3), places=3)
        self.assertNotIn("new head", self.run_it(f"--init={out}", "--mixup=0", "--epochs=1",
                                                 f"--workdir={self.root}/{names}"))
    headless = self.weights(change={"head/kernel": None, "head/bias": None})
    self.refused("needs --init=FILE.npz with a head", "--eval_only", f"--init={headless}")
    self.assertIn("Starting with a new head", self.run_it(f"--init={headless}"))
    before = model.flatten(random_params())["embedding/kernel"]
    close(self.arrays()["params/embedding/kernel"], before, atol=0.05)


class CheckpointTest(Case):

  def state(self, step=0):
    params = random_params(step)
    mean = jax.tree.map(lambda x: (x / 3).astype(jnp.bfloat16), params)
    return {"params": params, "opt_state": ((), {"mu": mean}, np.int32(step + 1)),
            "step": np.int32(step)}

  def recipe(self, **values):
    return {"lr": 1, "label_names": ("a", "b"), "process_count": 1} | values

  def save(self, step, **values):
    os.makedirs(self.workdir, exist_ok=True)
    train.save_checkpoint(self.workdir, self.state(step), TINY, self.recipe(**values), None).result()
    return train.checkpoint_path(self.workdir, step)

  def restore(self, state=None, allow_changes=False, recipe=None, **defaults):
    with printed() as out:
      state = train.restore_checkpoint(self.workdir, state or self.state(), recipe or self.recipe(),
                                       defaults, allow_changes)
    return state, out.getvalue()

  def refused(self, message, *args, **kwargs):
    self.assertRaisesRegex(train.UserError, message, self.restore, *args, **kwargs)

  def test_round_trip(self):
    os.makedirs(self.workdir)
    self.assertEqual(int(self.restore()[0]["step"]), 0)
    path = self.save(7)
    (state, said), expected = self.restore(), self.state(7)
    self.assertEqual(said, f"Resuming after step 7 from {path}.\n")
    jax.tree.map(same, state, expected)
    self.assertEqual(*[[x.dtype for x in jax.tree.leaves(t)] for t in (state, expected)])
    with np.load(path) as file:  # as in the README
      same(file["params/head/kernel"], expected["params"]["head"]["kernel"])
      self.assertEqual(file["label_names"].tolist(), ["a", "b"])
      self.assertEqual(json.loads(file["config"].item()), TINY._asdict())
    state["params"]["head"]["bias"] = np.zeros(4, np.float32)
    self.refused(r"no params/head/bias of shape \(4,\)", state, allow_changes=True)

  @cases("cut", "text", "flipped bit", "pickle", "foreign", "recipe")
  def test_a_damaged_file_is_named(self, damage):
    self.save(1)
    path = self.save(2)
    with open(path, "rb") as f:
      data = bytearray(f.read())
    data[len(data) // 2] ^= 1
    with open(path, "wb") as f:
      if damage == "pickle":
        np.savez(f, step=np.array([{}]))
      if damage in ("foreign", "recipe"):
        np.savez(f, step=1, **({"recipe": as_json({}).item()[:1]} if damage == "recipe" else {}))
      f.write({"cut": data[:-100], "text": b"hello", "flipped bit": data}.get(damage, b""))
    self.refused(f"{path} is damaged; delete it")
    os.remove(path)
    self.assertEqual(int(self.restore()[0]["step"]), 1)

  @cases(PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), MemoryError())
  def test_what_cannot_be_read_now_is_no_reason_to_delete(self, error):
    path = self.save(1)
    with patch(np, "load", side_effect=error):
      with self.assertRaises(model.WeightsError) as found:
        self.restore()
    self.assertEqual(str(found.exception), f"{path} cannot be read: {error!r}")
    self.assertEqual(int(self.restore()[0]["step"]), 1)

  def test_a_name_that_is_not_its_step(self):
    path = self.save(25)
    for name in ("50", "51"):
      shutil.copy(self.save(10), train.checkpoint_path(self.workdir, int(name)))
    self.refused("checkpoint_00000051.npz holds step 10: rename or delete it")
    self.save(26)  # which no newer name deletes
    self.assertEqual(self.steps(), [25, 26, 50, 51])

  @cases(
      ({}, {}, {}, None), ({"lr": 2}, {}, {}, r"lr=1 \(now 2\)"),
      ({"label_names": ("b", "a")}, {}, {}, r"label_names=\['a', 'b'\] \(now \['b', 'a'\]\)"),
      ({"process_count": 2}, {}, {}, r"process_count=1 \(now 2\)"),
      ({"order": 1}, {"order": 2}, {}, r"order=2 \(now 1\)"),
      # A fork's flag, which the file lacks: at its default, or not.
      ({"new": 0}, {}, {"new": 0}, None), ({"new": 3}, {}, {"new": 0}, r"new=0 \(now 3\)"),
      # What only the file has.
      ({}, {"new": 0}, {}, r"new=0 \(now unknown\)"), ({}, {"new": None}, {}, "new=None"))
  def test_another_run_is_refused(self, now, before, defaults, message):
    self.save(1, **before)
    if message:
      self.refused(f"{message}.*--allow_changes", recipe=self.recipe(**now), **defaults)
    state, _ = self.restore(recipe=self.recipe(**now), allow_changes=bool(message), **defaults)
    self.assertEqual(int(state["step"]), 1)

  def test_version_1(self):
    """From version 1.0 on, checkpoints stay readable: this one is written by hand."""
    params = model.flatten(model.init_params(0, TINY))
    names = [*params]
    self.assertLen(names, 24)
    arrays = {f"params/{name}": np.asarray(x) for name, x in params.items()}
    for moment, dtype in (("mu", jnp.bfloat16), ("nu", np.float32)):
      arrays |= {f"opt_state/1/{moment}/{name}": np.zeros(x.shape, dtype)
                 for name, x in params.items()}
    arrays |= {"opt_state/1/count": np.int32(15), "opt_state/4/count": np.int32(15),
               "step": np.int32(15), "label_names": np.array(["blue", "green", "red"])}
    config = """{"variant": "mu/8", "image_size": 16, "posemb": "sincos2d", "pool": "gap",
        "head": "mlp", "num_classes": 3, "dtype": "float32"}"""
    recipe = f"""{{"epochs": 4.0, "batch_size": 8, "dataset": "{self.data}", "train_split": "train",
        "variant": "mu/8", "image_size": 16, "num_classes": 3, "dtype": "float32",
        "randaug_layers": 0, "warmup_steps": 2, "label_names": ["blue", "green", "red"],
        "num_examples": 40, "process_count": 1}}"""
    os.makedirs(self.workdir)
    path = train.checkpoint_path(self.workdir, 15)
    self.assertEndsWith(path, "/checkpoint_00000015.npz")
    np.savez(path, **arrays, config=config, recipe=recipe)
    loaded = model.load(path)
    self.assertEqual(loaded[1:], (TINY, COLORS))
    same(loaded[0]["head"]["kernel"], arrays["params/head/kernel"])
    self.assertRegex(self.run_it(), "(?s)does not say its data, order: not compared.*Resuming after "
                     "step 15.*step 16/20.*Done")
    self.assertEqual(set(self.arrays()), {*arrays, "config", "recipe"})


class RunTest(Case):

  def test_a_run_and_its_log(self):
    """With the flags of the report's "Original", in passing."""
    flag = ("--pool=cls", "--head=linear", "--posemb=learned", "--mixup=0", "--grad_clip_norm=0",
            "--log_every=9", "--eval_every=15", "--eval=train[80%:],val", "--workdir=~/run")
    os.rename(f"{self.data}validation", f"{self.data}val")  # a folder's own split of this name
    self.addCleanup(os.rename, f"{self.data}val", f"{self.data}validation")
    clock = iter(np.arange(0, 1e6, 8.0))
    with patch(time, "perf_counter", lambda: next(clock)), \
        mock.patch.dict(os.environ, HOME=self.root):
      log, again = self.run_it(*flag), self.run_it(*flag)
    path = f"{self.workdir}/checkpoint_00000020.npz"
    for part in (rf"^mu/8 with .* 20 steps of 8, 40 images .*{self.workdir}\.\nCompiling the step",
                 "\nstep 1/20 .* compiled and done after .* s\n",
                 r"step 9/20  epoch 1.80  loss \S+  lr \S+  grad \S+  0\.\d images/s  waiting for dat"
                 r"a \d+%  \d+ min left\n", r"step 20/20 .* 0 s left\nEvaluation at step 20:\n  trai"
                 r"n\[80%:\] .* 8 images\n",
                 rf"\n  val .* 13 images\nDone: {path}\n$"):
      self.assertRegex(log, part)
    steps, evaluations = lines_of(self.workdir)
    self.assertEqual({str(line["step"]): f"{line['loss']:.4f}" for line in steps}, losses(log))
    # Each look at the clock is 8 s later, three of them in a step: after 30 s, a step is a line.
    self.assertContainsSubset({1, 3, 9, 18, 20}, {line["step"] for line in steps})
    self.assertEqual([line["step"] for line in evaluations], [15, 20, 20])
    with tf.io.gfile.GFile(tf.io.gfile.glob(f"{self.workdir}/events*")[0], "rb") as f:
      self.assertIn(b"train[80%:]/top1", f.read())
    self.assertRegex(again, "(?s)Resuming after step 20.*already finished.*val +top-1.*Done")
    # A batch of 12 is shared by eight devices, too; nothing is written.
    evaluated = run("--eval_only", f"--init={path}", f"--dataset={self.data}", "--batch_size=12",
                    "--eval=val", f"--workdir={self.root}/none")
    self.assertEqual(evaluated.splitlines(), [
        f"--init was trained on --dataset={self.data}", f"mu/8 of {path} on {{'val': 13}} images:",
        *log.splitlines()[-2:-1]])
    self.assertFalse(os.path.exists(f"{self.root}/none"))
    # The flags are there to be read, by a person and by --flagfile.
    with flagsaver.flagsaver():
      flags.FLAGS(["train.py", f"--flagfile={self.workdir}/flags.txt"])
      self.assertEqual((flags.FLAGS.eval, flags.FLAGS.pool, flags.FLAGS.init),
                       (["train[80%:]", "val"], "cls", None))

  def test_a_run_is_its_data(self):
    data = shutil.copytree(self.data, f"{self.root}/own") + "/"
    again = lambda *more: self.run_it(f"--dataset={data}", *more)
    again()
    shutil.copy(f"{data}validation/red/0.png", f"{data}validation/red/more.png")
    self.assertIn("already finished", again())  # a run is not what it is evaluated on
    image, = tf.io.gfile.glob(f"{data}train/blue/38.png")
    os.rename(image, f"{data}train/red/38.png")
    self.refused(r"data=\d+ \(now \d+\)", f"--dataset={data}")
    os.remove(f"{data}train/red/38.png")
    self.refused(r"num_examples=40 \(now 39\)", f"--dataset={data}")
    self.assertIn("Resuming", again("--allow_changes", "--epochs=5"))
    for split in ("train", "validation"):
      os.rename(f"{data}{split}/green", f"{data}{split}/wasp")
    self.refused(r"label_names=.*'green'.*\(now .*'wasp'", f"--dataset={data}", "--epochs=5")

  @cases(("validation/Red", "bad record .*validation/Red/.*: label is none of 3 classes; in a folder"),
         ("val/images", "bad record .*val/images/.*: label is none of 3", "--eval=val"),
         ("train/train/red", "only {'train': .*/train/train/red/.*expected .*SPLIT/CLASS/IMAGE"))
  def test_folders_that_are_not_what_they_look_like(self, folder, message, *more):
    files = {f"{split}/{name}/{i}.jpg": encoded(color=name)
             for split in ("train", "validation") for name in COLORS for i in range(3)}
    if "train" in folder:
      files = {}
    root = write_folder(f"{self.root}/own", files | {f"{folder}/{i}.jpg": encoded() for i in (1, 2)})
    self.refused(message, f"--dataset={root}", "--batch_size=8", "--epochs=40", *more)
    self.assertFalse(os.path.exists(self.workdir))  # before any training

  def test_a_signal_ends_a_run_and_it_goes_on(self):
    whole, more = f"{self.root}/whole", ("--eval_every=7", "--randaug_layers=2")
    self.run_it(f"--workdir={whole}", *more)
    log_step = train.RunLog.log_step
    def interrupted(run_log, step, *arguments):
      if step == 6:
        train.Stop.number = 15
      return log_step(run_log, step, *arguments)
    with patch(train.RunLog, "log_step", interrupted):
      log = self.run_it(*more)
    # The metrics of step 6 are read during step 7.
    self.assertRegex(log, "Stopped after step 7; the same command goes on .*\n\nexit: 143$")
    self.assertEqual(self.steps(), [5, 7])
    again = self.run_it(*more)
    self.assertEqual(
        re.findall("Resuming after step (.*) from|Reading past (.*) images|Evaluation at step (.*):",
                   again), [("7", "", ""), ("", "16", ""), ("", "", "14"), ("", "", "20")])
    self.assertRegex(again, "Reading past .*\nCompiling the step")
    self.assert_same_state(whole, self.workdir)

  def test_a_full_disk(self):
    """A checkpoint of which a part is written is none."""
    gfile, failed = tf.io.gfile.GFile, []
    def full(path, mode="r"):
      if failed or "checkpoint" not in path or self.steps() != [5, 10]:
        return gfile(path, mode)
      failed.append(path)
      with gfile(path, mode) as f:
        f.write(b"PK")
      raise OSError(28, "No space left on device")
    with patch(tf.io.gfile, "GFile", full):
      self.refused("No space left on device. Mend this")
    self.assertEqual(self.steps(), [5, 10])
    with open(f"{self.workdir}/log.jsonl", "a") as f:
      f.write('{"step": 1')  # its last line is cut off, too
    self.assertIn("Resuming after step 10", self.run_it())
    self.assertEqual(self.steps(), [15, 20])
    with open(f"{self.workdir}/log.jsonl") as f:
      half, = [line for line in f if not line.endswith("}\n")]
    self.assertEqual(half, '{"step": 1\n')
    error = tf.errors.ResourceExhaustedError(
        None, None, "{{function_node __wrapped__FlushSummaryWriter_device_/job:x}} a/b.v2; No space")
    with patch(train, "main", side_effect=error):
      self.refused("^a/b.v2; No space. Mend this")

  def test_out_of_memory(self):
    with patch(train, "main", side_effect=jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\n\nmany\nlines")):
      self.refused("^RESOURCE_EXHAUSTED: Out of memory.*; give a larger --grad_accum or a smaller "
                   "--batch_size$")

  @cases(ZeroDivisionError("unknown"), train.UserError("known"))
  def test_an_error_in_one_of_several_processes_ends_it(self, error):
    stderr = io.StringIO()
    with patch(train, "main", side_effect=error), contextlib.redirect_stderr(stderr), \
        patch(jax.distributed, "is_initialized", return_value=True), \
        patch(os, "_exit", side_effect=SystemExit) as ended:
      self.run_it()
    ended.assert_called_once_with(1)
    self.assertEndsWith(stderr.getvalue(), f"Error: {error}\n")
    self.assertEqual("Traceback" in stderr.getvalue(), str(error) == "unknown")

  def test_processes_agree(self):
    about, rows = {"label_names": ("a", "b"), "data": 7}, []
    def gathered(others):
      def gather(sums):
        rows.append(sums)
        return np.stack([sums, *others])
      with patch(train.multihost_utils, "process_allgather", gather):
        train.check_agreement(about)
    gathered([])
    gathered(rows)  # the same
    with flagsaver.flagsaver(workdir="other", data_dir="other", process_id=1, allow_changes=True):
      gathered(rows[:1])  # each process may have its own
    for change in (dict(lr=2.0), dict(log_every=3), dict(eval=["val"]), dict(eval_only=True),
                   dict(grad_accum=2), dict(eval_every=3), dict(checkpoint_every=3)):
      name, = change
      with flagsaver.flagsaver(**change):
        with self.assertRaisesRegex(train.UserError, f"only some have {name}=[^;]*$"):
          gathered(rows[:1])
    about = {"label_names": ("a", "c"), "data": 8}
    with self.assertRaisesRegex(train.UserError, r"have label_names=\('a', 'c'\); data=8$"):
      gathered(rows[:1])
    self.assertEqual(rows[0].dtype, np.uint32)  # 64-bit numbers would be cut
    self.assertLen({x.shape for x in rows}, 1)
    about = {}
    with open(f"{self.root}/code.py", "w") as f:
      f.write("other")
    with patch(augment, "__file__", f"{self.root}/code.py"):
      with self.assertRaisesRegex(train.UserError, "only some have code="):
        gathered(rows[:1])

  def test_a_loss_that_is_not_finite(self):
    said = self.refused("not finite at step .*loss.*--lr", "--lr=1e6", "--grad_clip_norm=0",
                        "--weight_decay=1e8", "--epochs=20", "--warmup_steps=9",
                        "--checkpoint_every=1")
    self.assertLess(self.steps()[-1], int(re.search(r"step (\d+)", said)[1]))
    model.load(train.checkpoints(self.workdir)[-1])  # which refuses what is not finite

  @cases(
      ("--image_size=20", "=20: expected a multiple"),
      ("--warmup_steps=20", "=20: expected fewer than the run's 20 steps, such as 2, .*--batch"),
      ("--batch_size=12", "=12: expected a multiple of 8 devices"),
      ("--dataset=nothing", "--dataset=nothing .*TFDS"),
      ("--eval=test", "nothing in 'test', only .*--eval"),
      ("--workdir=/dev/null/x", "Not a directory.*null/x"), ("stray.jpg", "stray.jpg.*expected flags"),
      ("--init=/nowhere.npz", "/nowhere.npz cannot be read: .*No such file"),
      ("--coordinator=localhost:1", "--num_processes and --process_id go together"),
      ("--num_processes=2 --process_id=1", "--coordinator"), ("--workdir=", "--workdir=: expected"),
      ("--coordinator=a --num_processes=2 --process_id=1", "--coordinator=HOST:PORT"),
      ("--eval=", "--eval="), ("--lr=nan", "--lr=nan: .*finite"))
  def test_bad_input_is_one_line(self, flag, message):
    self.refused(message, f"--data_dir={self.root}", *flag.split())

  @cases(({}, 0), ({"SLURM_NTASKS": "4"}, 0), ({"SLURM_STEP_NUM_TASKS": "1"}, 0),
         ({"SLURM_STEP_NUM_TASKS": "2"}, 2), ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, 3),
         ({"TPU_WORKER_HOSTNAMES": "WARNING: no hostnames, please set them"}, 0),
         ({"OMPI_COMM_WORLD_SIZE": "2"}, 2))
  def test_processes_are_joined(self, env, count):
    with patch(jax.distributed, "initialize") as initialize, mock.patch.dict(os.environ, env), \
        printed() as out:
      train.start_processes(None, None, None)
      self.assertEqual(initialize.call_count, bool(count))
      self.assertIn(f"Waiting for all {count} processes" if count else "", out.getvalue())
      initialize.side_effect = ValueError("coordinator_address should be defined.")
      with self.assertRaisesRegex(train.UserError, "--coordinator=.*, --num_processes and --process_id"):
        train.start_processes(None, 2, None)

  # Runs that are killed need processes of their own.

  def start(self, *more, devices=1, **kwargs):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen([sys.executable, "-u", f"{HERE}/train.py", *self.flags(*more)], env=env,
                            stdout=subprocess.PIPE, text=True, **kwargs)

  def read(self, process, until=None):
    """What a process prints, up to some line, or until it ends."""
    log = []
    for line in process.stdout:
      log.append(line)
      if until and re.search(until, line):
        return "".join(log)
    process.wait(60)
    self.assertIsNone(until, "".join(log))
    return "".join(log)

  def test_killed_at_random_the_run_is_the_same(self):
    more = "--epochs=16", "--checkpoint_every=1"
    rng, reached = default_rng(0), 0
    whole = losses(self.run_it(*more, f"--workdir={self.root}/whole"))
    self.assertLen(whole, 80)
    for kill, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
      process = self.start(*more, devices=8)  # it is nearly always writing a checkpoint
      log = self.read(process, f"^step {reached + rng.integers(2, 9)}/")
      if kill == signal.SIGKILL:
        self.assertIn("another run uses --workdir", self.run_it(*more))
      else:  # `| tee log` ends with Ctrl-C, too
        process.stdout.close()
      process.send_signal(kill)
      self.assertEqual(process.wait(60), code)
      self.assertLessEqual(losses(log).items(), whole.items())
      reached = self.steps()[-1]
    self.assertRegex(self.run_it(*more), f"(?s)Resuming after step {reached} .*Done")
    self.assert_same_state(f"{self.root}/whole", self.workdir)

  def test_signals_that_come_often_and_a_screen_that_knows_few_letters(self):
    """SIGHUP and SIGUSR1 stop as SIGTERM does, however often; nohup's is ignored."""
    def start(name, *more, **kwargs):
      return self.start("--epochs=4000", "--checkpoint_every=9999", "--eval_every=9999",
                        f"--workdir={self.root}/{name}", *more, **kwargs)
    with mock.patch.dict(os.environ, PYTHONIOENCODING="ascii"):
      ended = start("w\u00f6rk")
    ignored = start("nohup", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    for process in (ended, ignored):
      self.read(process, "^step 8/")
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
      ended.send_signal(number)
      time.sleep(0.01)
    log = self.read(ended)
    self.assertEqual(ended.returncode, 128 + signal.SIGHUP, log)
    self.assertRegex(log, "(?s)SIGHUP: stopping after this step.*Stopped after step")
    self.assertLen(train.checkpoints(f"{self.root}/w\u00f6rk"), 1)
    ignored.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    ignored.send_signal(signal.SIGUSR1)
    log = self.read(ignored)
    self.assertEqual(ignored.returncode, 128 + signal.SIGUSR1)
    self.assertNotIn("HUP", log)

  def test_a_signal_is_heard_while_the_process_waits(self):
    """In a step, in an evaluation, and where nothing would be saved; a second one ends it at once."""
    script = """if True:
        import sys, time, threading, train
        from unittest import mock
        train.listen_for_signals()
        train.Stop.then = sys.argv[1]
        print("step 1/", flush=True)
        lock = threading.Lock()  # to wait for it is C code, as to wait for a step
        with lock:
          lock.acquire()
        """
    for then, first, code in (("after this step", signal.SIGUSR1, None),
                              ("after this evaluation and one more step", signal.SIGINT, None),
                              ("now", signal.SIGHUP, 129)):
      process = subprocess.Popen([sys.executable, "-u", "-c", script, then], cwd=HERE, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
      self.read(process, "step 1/")
      process.send_signal(first)
      self.assertEqual(process.stdout.readline(), f"{first.name}: stopping {then}\n")
      if code is None:
        process.send_signal(signal.SIGTERM)
        if first != signal.SIGINT:  # so that it was the first SIGTERM
          self.assertEqual(process.stdout.readline(), f"SIGTERM: stopping {then}\n")
          process.send_signal(signal.SIGTERM)
        self.assertEqual(process.stdout.readline(), "SIGTERM: stopping now\n")
      self.assertEqual(process.wait(5), code or 143)

  def pair(self, *more, own=("", "")):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      more += f"--coordinator=127.0.0.1:{s.getsockname()[1]}", "--num_processes=2"
    return [self.start("--epochs=24", "--batch_size=16", "--log_every=4", *more, *own[i].split(),
                       f"--process_id={i}", stderr=subprocess.STDOUT) for i in range(2)]

  def test_two_processes(self):
    """One is lost; a signal to the second one stops both; resumed, they end as one would here."""
    ended = lambda pair: [process.communicate(timeout=200)[0] for process in pair]
    lost = self.pair(f"--workdir={self.root}/lost", "--epochs=4000")
    self.read(lost[0], "^step 8/")
    lost[1].kill()  # the heartbeat takes half a minute
    first = self.pair()
    log = self.read(first[0], "^step 4/")
    first[1].send_signal(signal.SIGTERM)
    log += ended(first)[0]
    self.assertEqual([process.returncode for process in first], [143, 143], log)
    stopped = int(re.search("Stopped after step (.*);", log)[1])
    self.assertEqual((stopped % 4, self.steps()[-1]), (0, stopped))
    self.refused(r"process_count=2 \(now 1\)", "--epochs=24", "--batch_size=16")
    again = self.pair()
    log, second = ended(again)
    self.assertEqual([process.returncode for process in again], [0, 0], log + second)
    self.assertRegex(log, f"(?s)Waiting for all 2.*Resuming after step {stopped} from.*60 steps "
                     "of 16, 40 images.* 13 images\nDone")
    self.assertNotIn("step 60/", second)
    replicated, by_rows = shardings(2)
    init, step = train.make_training(TINY, replicated, by_rows, 60, train.Settings(warmup_steps=2))
    state = jax.device_put(init(model.init_params(0, TINY)), replicated)
    image = functools.partial(augment.train_image, image_size=16, randaug_layers=0)
    data = inputs.open_dataset(self.data)
    shares = (inputs.train_batches(data, "train", 16, image, dtype="float32", process_index=i,
                                   process_count=2) for i in range(2))
    for rows in take(zip(*shares), 60):
      batch = jax.tree.map(lambda *x: np.concatenate(x), *rows)
      state, _ = step(state, jax.device_put(batch, by_rows))
    arrays = self.arrays()
    for name, x in model.flatten(state).items():
      same(arrays[name], x, name)
    self.assertRegex(ended(lost)[0], "another process was lost|another task died")
    self.assertNotEqual(lost[0].returncode, 0)

  def test_two_processes_that_differ(self):
    other = shutil.copytree(self.data, f"{self.root}/other")
    for split in ("train", "validation"):
      os.rename(f"{other}/{split}/green", f"{other}/{split}/wasp")
    pairs = (self.pair(own=("--head=mlp", "--head=linear")),
             self.pair(own=("", f"--dataset={other}/")))
    for pair, named in zip(pairs, ("head=", "dataset=.*label_names=")):
      for process in pair:
        log = process.communicate(timeout=100)[0]
        self.assertRegex(log.splitlines()[-1], f"^Error: .*only some have .*{named}")
        self.assertEqual(process.returncode, 1)

  def test_a_second_signal_where_another_process_stands_still(self):
    pairs = [self.pair("--epochs=4000", f"--workdir={self.root}/{i}") for i in range(2)]
    for i, pair in enumerate(pairs):
      self.read(pair[0], "^step 8/")
      pair[i].send_signal(signal.SIGSTOP)
    for i, pair in enumerate(pairs):
      self.addCleanup(pair[i].kill)
      time.sleep(1)
      for _ in range(2):
        pair[1 - i].send_signal(signal.SIGTERM)
        time.sleep(0.5)
      self.assertEqual(pair[1 - i].wait(5), 143)
      self.assertRegex(pair[1 - i].stdout.read(), "(?s)SIGTERM: stopping after the next --log_every-th"
                       ".*SIGTERM: stopping now\n$")


class ReadmeTest(Case):

  def setUp(self):
    super().setUp()
    with open(f"{HERE}/README.md") as f:
      self.text = f.read()

  def test_commands(self):
    commands = re.findall(r"(python \w+\.py[^`\n#]*)", self.text.replace("\n  ", " "))
    self.assertGreater(len(commands), 14)
    for command in commands:
      _, script, *arguments = shlex.split(command)
      self.assertTrue(os.path.exists(f"{HERE}/{script}"), command)
      if script == "train.py":
        with flagsaver.flagsaver():
          self.assertLen(flags.FLAGS([script, *arguments]), 1, command)
    few = {f"train/{name}/{i}.jpg": encoded(color=name) for name in COLORS for i in range(14)}
    write_folder(f"{self.root}/flowers", few | {f"validation/{COLORS[0]}/1.jpg": encoded()})
    mine, = (shlex.split(command)[2:] for command in commands if "flowers_run" in command)
    with contextlib.chdir(self.root):
      log = run(*[flag for flag in mine if not flag.startswith("--init")], "--variant=mu/16",
                "--image_size=32")
    self.assertRegex(log, "(?s)66 steps of 32, 42 images.*Evaluation at step 50.*Done: flowers_run/")

  def test_blocks(self):
    blocks = dict(re.findall(r"\*\*([^*]+?)\*\*(?:(?!\*\*|```).)*```python\n(.*?)```", self.text, re.S))
    self.assertIn("# No test runs this block.", blocks.pop("In timm"))
    config = model.Config("demo/12", 48, num_classes=len(inputs.PATTERNS), dtype="float32")
    weights = self.weights(config, config=as_json(config._asdict()),
                           label_names=np.array(list(inputs.PATTERNS)))
    write_folder(self.root, {"IMAGE.jpg": encoded((300, 200)), "demo/none": b""})
    os.rename(weights, f"{self.root}/demo/checkpoint_00002970.npz")
    printed_by = {}
    with contextlib.chdir(self.root), \
        patch(inputs, "open_dataset", return_value=numbers_dataset()):
      for name, block in blocks.items():
        for big, small in (("128", "8"), ('Config("S/16", dtype', 'Config("mu/16", 32, dtype')):
          block = block.replace(big, small)
        with printed() as out:
          exec(compile(block, "README.md", "exec"), {})
        printed_by[name] = out.getvalue()
      self.assertEqual(tf.io.decode_png(tf.io.read_file("augment.png")).shape, (1792, 1792, 3))
    for name, expected in {
        "What is in it:": r"(\w+ \d+\.\d%\n){5}",
        "Every parameter": r"embedding/kernel \(16, 16, 3, 384\)\n(.*\n)+head/bias \(1000,\)\n",
        "Every augmentation": "", "How fast is the input here?": r"[\d.]+ images/s\n",
        "Will it fit, and how fast is a step":
            r"[\d.]+ GiB on each of 8, .* GB moved a step\n[\d.]+ images/s\n"}.items():
      self.assertRegex(printed_by.pop(name), f"^{expected}$", name)
    self.assertEqual(printed_by, {})


if __name__ == "__main__":
  absltest.main()
