"""Tests of everything, against values derived by hand or in float64 numpy: `python test_all.py [TestCase[.test]]`."""

import ast
import collections
import contextlib
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from unittest import mock
import zipfile

from absl import flags
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized

CACHE = tempfile.TemporaryDirectory()  # of what XLA compiles: many tests run the same few programs
os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import jax

jax.config.update("jax_num_cpu_devices", 8)  # simulated; before anything uses them

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import tensorflow as tf
import tensorflow_datasets as tfds

import augment
import input_pipeline
import model
import train

HERE = os.path.dirname(os.path.abspath(__file__))
folder, patch, cases = tempfile.TemporaryDirectory, mock.patch.object, parameterized.parameters
close, same, default_rng = np.testing.assert_allclose, np.testing.assert_array_equal, np.random.default_rng
TINY = model.Config("mu/8", 16, num_classes=3, dtype="float32")
IMAGES = default_rng(1).uniform(-1, 1, (3, 16, 16, 3))  # what TINY takes


def shardings(devices=None):
  """Over all devices, or some: of what is the same on each, and of rows that are split."""
  mesh = Mesh(devices or jax.devices(), ("data",))
  return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def shapes_of(config):
  return {name: shape for name, (shape, _) in model.parameter_table(config).items()}


def random_params(seed=0, config=TINY):
  """Parameters that are nowhere zero, so that every one of them matters."""
  rng = default_rng(seed)
  return model.unflatten({name: np.float32(rng.normal(0, 0.3, shape)) for name, shape in shapes_of(config).items()})


# --- model.py ---


def numpy_forward(p, images, attention_probs=None):
  """The ViT in float64, written from the report; the attention of each block, [B, N, L, L], goes into a list."""
  f = {name: np.asarray(array, np.float64) for name, array in model.flatten(p).items()}
  dense = lambda name, x: x @ f[f"{name}/kernel"] + f[f"{name}/bias"]

  def norm(name, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * f[f"{name}/scale"] + f[f"{name}/bias"]

  P, _, _, D = f["embedding/kernel"].shape
  omega = np.array([10000 ** (-i / (D // 4 - 1)) for i in range(D // 4)])
  tokens, side = [], images.shape[1] // P
  for row, column in itertools.product(range(side), range(side)):
    patch = images[:, row * P:(row + 1) * P, column * P:(column + 1) * P]
    position = np.concatenate([g(x * omega) for x in (column, row) for g in (np.sin, np.cos)])
    position = f["pos_embedding"][0, row * side + column] if "pos_embedding" in f else position
    tokens.append(np.einsum("bijc,ijcd->bd", patch, f["embedding/kernel"]) + f["embedding/bias"] + position)
  x = np.stack(([0 * tokens[0] + f["cls"][0, 0]] if "cls" in f else []) + tokens, 1)
  for i in range(sum(name.endswith("/query/bias") for name in f)):
    block = f"Transformer/encoderblock_{i}"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    y = norm(f"{block}/LayerNorm_0", x)
    q, k, v = (np.einsum("bld,dnh->bnlh", y, f[f"{attention}/{s}/kernel"]) + f[f"{attention}/{s}/bias"][:, None]
               for s in ("query", "key", "value"))
    probs = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3]))
    probs /= probs.sum(-1, keepdims=True)
    x = x + np.einsum("bnlh,nhd->bld", probs @ v, f[f"{attention}/out/kernel"]) + f[f"{attention}/out/bias"]
    y = dense(f"{block}/MlpBlock_0/Dense_0", norm(f"{block}/LayerNorm_1", x))
    x = x + dense(f"{block}/MlpBlock_0/Dense_1", tanh_gelu(y))
    if attention_probs is not None:
      attention_probs.append(probs)
  x = norm("Transformer/encoder_norm", x)
  x = x[:, 0] if "cls" in f else x.mean(1)
  return dense("head", np.tanh(dense("pre_logits", x)) if "pre_logits/kernel" in f else x)


def tanh_gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


class ModelTest(parameterized.TestCase):

  @cases(
      ("sincos2d", "gap", 22_122_472, 21_974_632), ("sincos2d", "cls", 22_122_856, 21_975_016),
      ("learned", "gap", 22_197_736, 22_049_896), ("learned", "cls", 22_198_120, 22_050_280))
  def test_published_counts(self, posemb, pool, *counts):
    for head, count in zip(("mlp", "linear"), counts):
      shapes = shapes_of(model.Config("S/16", 224, posemb, pool, head, 1000))
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

  def test_published_names_shapes_and_initial_statistics(self):
    """The last number of a row is fan-in, the sum of both fans, or 1 / variance."""
    params = model.flatten(model.init_params(0, model.Config(posemb="learned", pool="cls")))
    self.assertLen(params, 10 + 12 * 16)  # all that the table describes
    for name, x in params.items():
      row, = (row for row in map(str.split, self.PUBLISHED.splitlines()[1:]) if re.fullmatch(row[0], name))
      _, shape, kind, *n = row
      self.assertEqual((",".join(map(str, x.shape)), x.dtype), (shape, jnp.float32), name)
      if kind in "01":
        same(x, float(kind), name)
        continue
      n, largest = float(*n), abs(x).max()
      std = math.sqrt((2 if kind == "xavier" else 1) / n)
      close(x.std(), std, rtol=4 / math.sqrt(2 * x.size), err_msg=name)
      if kind == "xavier":  # uniform
        self.assertBetween(largest, 0.999 * math.sqrt(6 / n), 1.000001 * math.sqrt(6 / n), name)
      elif kind == "lecun":  # normal, cut at two standard deviations, then rescaled
        close(largest, 2 * std / 0.87962566, rtol=0.01, err_msg=name)

  @cases(
      ("demo", 64, 4, 256, 1), ("mu", 32, 1, 128, 2), ("Ti", 192, 12, 768, 3), ("S", 384, 12, 1536, 6),
      ("M", 512, 12, 2048, 8), ("B", 768, 12, 3072, 12), ("L", 1024, 24, 4096, 16), ("H", 1280, 32, 5120, 16))
  def test_variants(self, name, D, blocks, M, N):
    config = model.Config(f"{name}/32")
    self.assertEqual((config.sizes, len(shapes_of(config))), ((32, D, blocks, M, N), 8 + 16 * blocks))

  def test_an_array_depends_on_seed_and_name_only(self):
    one, other, again = (model.init_params(seed, model.Config("mu/16", *more)) for seed, *more in (
        (1, 32), (1, 64, "learned", "cls", "linear", 10), (2, 32)))
    same(model.forward(one, np.ones((2, 32, 32, 3)), model.Config("mu/16", 32)), 0)  # so the first loss is log(C)
    one, other, again = map(model.flatten, (one, other, again))
    for name in one.keys() & other.keys() - {"head/kernel", "head/bias"}:
      same(one[name], other[name], name)
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
    self.assertGreater(abs(one[f"{attention}/query/kernel"] - one[f"{attention}/key/kernel"]).max(), 0.1)
    self.assertGreater(abs(one["embedding/kernel"] - again["embedding/kernel"]).max(), 0.01)

  @parameterized.product(posemb=["sincos2d", "learned"], pool=["gap", "cls"], head=["mlp", "linear"])
  def test_forward_is_the_reports(self, **kwargs):
    config, probs = TINY._replace(**kwargs), []
    params = random_params(config=config)
    logits = model.forward(params, IMAGES, config)
    self.assertEqual((logits.shape, logits.dtype), ((3, 3), jnp.float32))
    close(logits, numpy_forward(params, IMAGES, probs), rtol=2e-4, atol=2e-4)
    probs = probs[-1].mean(1)  # of the last block, over heads: [B, queries, keys]
    expected = probs[:, 0, 1:] if config.pool == "cls" else probs.mean(1)
    close(model.attention_map(params, IMAGES, config), expected.reshape(3, 2, 2), rtol=1e-4)
    rounded = model.forward(params, IMAGES, config._replace(dtype="bfloat16"))
    self.assertEqual(rounded.dtype, jnp.float32)
    close(rounded, logits, atol=0.05)
    self.assertGreater(abs(rounded - logits).max(), 1e-6)

  @parameterized.product(dtype=[jnp.float32, jnp.bfloat16], specs=[
      ("bld,dnh->blnh", "blnh,dnh->bld", "bld,blnh->dnh"), ("blnh,nhd->bld", "bld,nhd->blnh", "blnh,bld->nhd")])
  def test_product_and_its_gradients(self, dtype, specs):
    """In the type of x, but the kernel's gradient in float32, not even rounded on its way."""
    rng, sizes = default_rng(0), dict(b=2, l=5, d=7, n=3, h=4)
    x, w, g = (rng.normal(size=[sizes[c] for c in s]) for s in re.split(",|->", specs[0]))
    x, w, g = jnp.asarray(x, dtype), jnp.float32(w), jnp.asarray(g, dtype)
    out, pull = jax.vjp(functools.partial(model.product, specs[0]), x, w)
    x64, w64, g64 = (np.float64(jnp.asarray(a, dtype)) for a in (x, w, g))  # rounded inputs, exact products
    expected = map(np.einsum, specs, (x64, g64, x64), (w64, w64, g64))
    for got, want, of in zip((out, *pull(g)), expected, (dtype, dtype, jnp.float32)):
      self.assertEqual(got.dtype, of)
      close(np.float64(got), want, atol=1e-5, rtol=1e-5 if of == jnp.float32 else 2 ** -8)

  def test_dense(self):
    """1.5 + 2^-8 is no number of bfloat16, nor is 1001: biases are added and summed in float32."""
    p = {"kernel": np.full((2, 1), 0.75, np.float32), "bias": np.array([-1.5 - 2 ** -8], np.float32)}
    y, pull = jax.vjp(lambda p, x: model.dense("bd,de->be", p, x), p, jnp.ones((1001, 2), jnp.bfloat16))
    self.assertEqual((y.dtype, y.shape, y[0, 0]), (jnp.bfloat16, (1001, 1), -2 ** -8))
    for grad in jax.tree.leaves(pull(jnp.ones_like(y))[0]):
      self.assertEqual(grad.dtype, jnp.float32)
      same(grad, 1001)

  def test_layer_norm(self):
    rng = default_rng(0)
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
    x64 = rng.normal(size=(3, 5, 8)) * np.array([1, 30, 1e-3])[:, None, None]  # in the last, eps = 1e-6 counts
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6) * scale + bias
    close(model.layer_norm({"scale": scale, "bias": bias}, jnp.float32(x64)), expected, rtol=1e-5, atol=1e-5)

  def test_gradients_by_differences(self):
    params, images = random_params(), IMAGES[:2]
    loss = lambda p, **kwargs: model.forward(p, images, TINY, **kwargs)[:, 0].sum()
    grads = model.flatten(jax.grad(loss)(params))
    remat = model.flatten(jax.grad(lambda p: loss(p, remat=True))(params))
    rng = default_rng(2)
    for name, array in model.flatten(params).items():
      close(remat[name], grads[name], rtol=1e-4, atol=1e-5)
      direction = rng.normal(size=array.shape)
      def moved(step):
        there = model.flatten(params) | {name: array + step * direction}
        return numpy_forward(model.unflatten(there), images)[:, 0].sum()
      slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
      self.assertAlmostEqual(slope, float((grads[name] * direction).sum()), delta=1e-3 * (1 + abs(slope)), msg=name)

  def test_flops_by_hand(self):
    # mu/8 at 16: patches 192*32; a token: q k v out 4*32*32, MLP 2*32*128, attention 2*L*32; pooled: 32*32 and 32*3.
    for pool, L in (("gap", 4), ("cls", 5)):
      expected = 2 * (4 * 192 * 32 + L * 4 * 32 * 32 + L * 2 * 32 * 128 + 2 * L * L * 32 + 32 * 32 + 32 * 3)
      self.assertEqual(model.flops(TINY._replace(pool=pool)), expected)

  @cases(("gap", "cudnn", "bfloat16", 1), ("cls", "cudnn", "bfloat16", 0), ("gap", "cudnn", "float32", 0),
         ("gap", "xla", "bfloat16", 0))
  def test_wiring_of_cudnn_attention(self, pool, attention, dtype, expected):
    """With a stand-in for cuDNN's, which takes bfloat16 and an even number of tokens."""
    config = TINY._replace(pool=pool, attention=attention, dtype=dtype)
    params, xla = random_params(config=config), jax.nn.dot_product_attention
    with patch(jax.nn, "dot_product_attention", side_effect=lambda q, k, v, implementation: xla(q, k, v)) as used:
      close(model.forward(params, IMAGES, config), numpy_forward(params, IMAGES), atol=0.05)
    self.assertEqual([call.kwargs for call in used.call_args_list], [{"implementation": "cudnn"}] * expected)

  @cases("float32", "bfloat16")
  def test_float32_means_float32(self, dtype):
    """No CPU's result shows it: TPUs and recent GPUs round the factors of a product unless it is HIGHEST."""
    loss = functools.partial(train.loss_fn, config=TINY._replace(dtype=dtype))
    batch = {"images": np.float32(IMAGES), "labels": np.ones((3, 3), np.float32)}
    text = jax.jit(jax.value_and_grad(loss)).lower(random_params(), batch).as_text()
    self.assertNotIn("convolution", text)
    found = re.findall(r"dot_general .* = \[(\w+), .* : \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", text)
    # Forward and two derivatives of q, k, v, out, Dense_0, Dense_1, q k^T, probs v, pre_logits, head (these two are
    # always float32); patches, without a derivative of the images. In float32, q k^T is computed twice.
    exact = [row for row in found if row == ("HIGHEST", "f32", "f32")]
    rounded = [row for row in found if row[0] == "DEFAULT"]
    self.assertEqual((len(exact), len(rounded), len(found)), (33, 0, 33) if dtype == "float32" else (6, 26, 32))

  @cases(
      ("variant", "XL/16", "one of.*mu"), ("variant", "S", "such as S/16"), ("variant", "S/0", "such as S/16"),
      ("image_size", 225, "multiple of the patch size, 16"), ("image_size", 8, "mult"), ("pool", "max", "gap or cls"))
  def test_errors(self, field, value, message):
    self.assertTrue(issubclass(model.WeightsError, ValueError))
    with self.assertRaisesRegex(model.WeightsError, f"--{field}={value}: .*{message}"):
      model.parameter_table(model.Config(**{field: value}))


# --- The method: schedule, optimiser, step, evaluation ---


def tiny_batch(size=16, seed=0, config=TINY):
  rng, I = default_rng(seed), config.image_size
  return {"images": np.float32(rng.uniform(-1, 1, (size, I, I, 3))),
          "labels": np.float32(rng.dirichlet(np.ones(config.num_classes), size)), "bad": np.zeros(size, bool)}


def train_steps(batches, devices=8, put=None, **settings):
  """One step on each batch: the metrics of all, {name: list}, and the last state."""
  replicated, split = shardings(jax.devices()[:devices])
  init, step = train.make_training(TINY, replicated, split, 150, **settings)
  state, history = jax.device_put(init(random_params()), replicated), collections.defaultdict(list)
  for batch in batches:
    before, (state, metrics) = state, step(state, (put or train.put)(batch, split))
    assert all(x.is_deleted() for x in jax.tree.leaves(before))  # the step reuses its memory
    for name, x in metrics.items():
      history[name].append(x.item())
  return history, jax.device_get(state)


def numpy_loss(logits, labels):
  """Cross-entropy of each row."""
  return -(labels * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)


def norm(tree):
  return math.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(tree)))


class MethodTest(parameterized.TestCase):

  def test_the_defaults_are_the_paper(self):
    expected = dict(
        epochs=90, batch_size=1024, dataset="imagenet2012", train_split="train[:99%]", variant="S/16", image_size=224,
        posemb="sincos2d", pool="gap", head="mlp", randaug_layers=2, randaug_magnitude=10, mixup=0.2, lr=1e-3,
        weight_decay=1e-4, warmup_steps=10_000, grad_clip_norm=1, dtype="bfloat16", seed=0, init=None)
    self.assertEqual({name: flags.FLAGS[name].default for name in expected}, expected)
    self.assertEmpty(expected.keys() & train.NOT_RECIPE)
    self.assertContainsSubset(["workdir", "data_dir", "eval", "grad_accum", "remat"], train.NOT_RECIPE)
    self.assertEqual(flags.FLAGS.grad_accum, 1)
    for function in (model.Config, train.make_training, input_pipeline.train_batches):  # their defaults are the same
      for name, p in inspect.signature(function).parameters.items():
        if name in expected and p.default is not p.empty:
          self.assertEqual(p.default, expected[name], f"{name} of {function}")
    self.assertEqual(train.EVALS, {
        "minival": (None, "train[99%:]", "label"), "val": (None, "validation", "label"),
        "real": ("imagenet2012_real", "validation", "real_label"), "v2": ("imagenet_v2", "test", "label")})

  def test_the_flags_reach_what_they_are_for(self):
    class Reached(Exception):
      pass
    with folder() as root, flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()), \
        patch(signal, "signal"), patch(input_pipeline, "open_dataset", lambda *_: NUMBERS), \
        patch(train, "restore_checkpoint", lambda _, state, *__: (state, None)), \
        patch(train, "make_optimizer", wraps=train.make_optimizer) as make_optimizer, \
        patch(train, "make_training", wraps=train.make_training) as make_training, \
        patch(model, "init_params", return_value={"kernel": np.zeros(1)}) as init_params, \
        patch(input_pipeline, "train_batches", side_effect=Reached) as train_batches:
      flags.FLAGS(f"""train.py --train_split=train[:80%] --batch_size=16 --epochs=7 --warmup_steps=5 --lr=0.5
          --weight_decay=0.25 --grad_clip_norm=3 --randaug_layers=1 --randaug_magnitude=4 --mixup=0.3 --variant=mu/8
          --image_size=24 --posemb=learned --pool=cls --head=linear --seed=6 --dtype=float32 --grad_accum=2 --remat
          --eval=train --workdir={root}/run --skip_bad_images""".split())
      self.assertRaises(Reached, train.main, ["train.py"])
    config, (replicated, by_rows) = model.Config("mu/8", 24, "learned", "cls", "linear", 3, "float32"), shardings()
    rates = dict(lr=0.5, weight_decay=0.25, grad_clip_norm=3)
    for stand_in, function, expected in (
        (make_optimizer, train.make_optimizer, rates), (init_params, model.init_params, dict(seed=6, config=config)),
        (make_training, train.make_training, rates | dict(config=config, replicated=replicated, by_rows=by_rows,
         total_steps=18, warmup_steps=5, grad_accum=2, remat=True)),  # 7 * 40 / 16 = 17.5
        (train_batches, input_pipeline.train_batches, dict(
            dataset=NUMBERS, split="train[:80%]", batch_size=16, start_step=0, image_size=24, randaug_layers=1,
            randaug_magnitude=4, mixup_p=0.3, dtype="float32", seed=6, process_index=0, process_count=1,
            skip_bad_images=True))):
      call = inspect.signature(function).bind(*stand_in.call_args.args, **stand_in.call_args.kwargs).arguments
      self.assertEqual(call | expected, call)

  def test_schedule(self):
    def schedule(warmup, total):
      with patch(train, "make_optimizer", wraps=train.make_optimizer) as make:
        train.make_training(TINY, *shardings(), total, warmup_steps=warmup)
      return make.call_args.args[0]
    total = round(90 * 1_268_355 / 1024)
    self.assertEqual(total, 111_477)
    rate = schedule(10_000, total)
    last = 0.5 * (1 + math.cos(math.pi * (total - 1 - 10_000) / (total - 10_000)))
    for step, factor, delta in (
        (0, 0, 0), (1, 1e-4, 2e-8), (5_000, 0.5, 2e-7), (10_000, 1, 0), (10_000 + 101_477 / 2, 0.5, 2e-7),
        (10_000 + 101_477 / 4, 0.5 + math.sqrt(0.125), 2e-7), (total - 1, last, 1e-9), (total, 0, 1e-9)):
      self.assertAlmostEqual(float(rate(step)), factor, delta=delta, msg=step)
    self.assertEqual(float(schedule(0, 10)(0)), 1)

  def test_three_updates_against_float64(self):
    rng = default_rng(0)
    params = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3), "scale": rng.normal(size=2)}
    params, factors = jax.tree.map(np.float32, params), [0.0, 0.5, 1.0]
    tx = train.make_optimizer(lambda step: jnp.array(factors)[step], lr=0.01, weight_decay=0.1, grad_clip_norm=1.0)
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
        step = 0.01 * (mu[name] / (1 - 0.9 ** t)) / (np.sqrt(nu[name] / (1 - 0.999 ** t)) + 1e-8)
        expected[name] -= factors[t - 1] * (step + 0.1 * (name == "kernel") * expected[name])
        mu[name] = np.float64(jnp.asarray(mu[name], jnp.bfloat16))  # how it is stored
      self.assertEqual(norm(updates) == 0, t == 1)  # the first rate is 0
    for name, x in params.items():
      close(x, expected[name], atol=2e-4, err_msg=name)
    adam = next(s for s in state if hasattr(s, "mu"))
    for name, x in params.items():
      self.assertEqual((adam.mu[name].dtype, adam.nu[name].dtype), (jnp.bfloat16, jnp.float32))
      close(np.float64(adam.mu[name]), mu[name], atol=2e-3)
      close(adam.nu[name], nu[name], rtol=1e-5)

  def test_decay_and_clipping(self):
    """Decay is not multiplied by the rate, and reaches kernels only; clipping can be off."""
    params = jax.tree.map(jnp.ones_like, random_params(config=TINY._replace(posemb="learned", pool="cls")))
    tx = train.make_optimizer(lambda _: 0.5, lr=0.0, weight_decay=1e-4)
    for name, x in model.flatten(tx.update(params, tx.init(params), params)[0]).items():
      close(x, -0.5e-4 if name.endswith("/kernel") else 0, rtol=1e-6, err_msg=name)
    params = {"kernel": jnp.ones(2)}
    for clip, nu in ((1.0, 0.001 * 0.5), (0.0, 0.001 * 9)):
      tx = train.make_optimizer(lambda _: 1.0, grad_clip_norm=clip)
      _, state = tx.update({"kernel": jnp.full(2, 3.0)}, tx.init(params), params)
      close(next(s for s in state if hasattr(s, "nu")).nu["kernel"], nu, rtol=1e-5)

  def test_devices_accumulation_and_remat_change_nothing(self):
    batches = [tiny_batch(seed=seed) for seed in range(3)]
    one, state = train_steps(batches, 1, warmup_steps=2)
    params, flat = random_params(), model.flatten(state["params"])
    grads = jax.grad(lambda p: optax.softmax_cross_entropy(
        model.forward(p, batches[0]["images"], TINY), batches[0]["labels"]).sum() / 16)(params)
    self.assertGreater(norm(grads), 1.1)  # grad_norm is of before clipping
    loss = numpy_loss(numpy_forward(params, batches[0]["images"]), batches[0]["labels"]).mean()
    for name, first in dict(loss=loss, grad_norm=norm(grads), param_norm=norm(params), bad=0, stop=0).items():
      self.assertAlmostEqual(one[name][0], first, delta=1e-4, msg=name)
    close(one["learning_rate"], [0, 5e-4, 1e-3], rtol=1e-6)
    close(one["param_norm"][2], norm(state["params"]), rtol=1e-6)  # of after the update
    self.assertEqual(state["step"], 3)
    for kwargs in (dict(devices=2), {}, dict(devices=2, grad_accum=4), dict(grad_accum=2, remat=True)):
      other, state = train_steps(batches, warmup_steps=2, **kwargs)
      for name in ("loss", "grad_norm", "param_norm"):
        close(other[name], one[name], rtol=2e-5, err_msg=f"{name} {kwargs}")
      for name, x in model.flatten(state["params"]).items():
        close(x, flat[name], atol=5e-4, err_msg=name)

  def test_what_processes_tell_each_other(self):
    with patch(train, "received_signal", 15):
      self.assertEqual(train.put(tiny_batch(), shardings()[1])["stop"].tolist(), [15] * 16)
    def put(batch, split):  # the last of many processes received a signal
      return train.put(batch, split) | {"stop": jax.device_put(np.int32([0] * 15 + [2]), split)}
    history, _ = train_steps([tiny_batch() | {"bad": np.arange(16) < 3}], put=put, warmup_steps=0)
    self.assertEqual((history["bad"], history["stop"]), ([3], [2]))

  @cases(1, 2)
  def test_keys_that_the_code_does_not_know_reach_the_loss(self, grad_accum):
    def loss_fn(params, batch, *_, **__):  # every weight with its own picture
      return (batch["weights"][:, 0] * batch["images"].mean((1, 2, 3))).mean() + 0 * params["head"]["bias"].sum()
    batch = tiny_batch() | {"weights": default_rng(5).normal(size=(16, 2))}
    with patch(train, "loss_fn", loss_fn):
      history, _ = train_steps([batch], grad_accum=grad_accum, warmup_steps=0)
    close(history["loss"], (batch["weights"][:, 0] * batch["images"].mean((1, 2, 3))).mean(), atol=1e-6)

  def test_eval_step(self):
    config, (replicated, split) = TINY._replace(num_classes=7), shardings()
    params, batch = random_params(config=config), tiny_batch(8, 3, config)
    logits = numpy_forward(params, batch["images"])
    labels, best = np.zeros((8, 7), np.float32), logits.argsort(1)[:, ::-1]
    for row, ranks in enumerate(([0], [1], [4], [5, 6], [0, 3, 5], [2, 6], [], [0])):
      labels[row, best[row, ranks]] = 1  # the right answers' ranks among the predictions
    mask = np.arange(8) < 7
    batch |= {"labels": labels, "mask": mask, "bad": ~mask, "unknown": np.zeros((8, 2))}
    metrics = train.make_eval_step(config, replicated, split)(params, train.put(batch, split))
    loss = numpy_loss(logits[:6], labels[:6] / labels[:6].sum(1, keepdims=True)).sum()
    for name, expected in dict(count=6, top1=2, top5=5, bad=1, stop=0, loss=loss).items():
      self.assertAlmostEqual(metrics[name].item(), expected, delta=1e-4, msg=name)

  def test_evaluate(self):
    """Three batches as one set, under a name of the caller's; nothing of a set that a signal ended."""
    def eval_step(params, batch):
      sums = {"count": batch["mask"].sum(), "top1": params, "top5": 2 * params, "loss": 3 * params}
      return sums | train.host_metrics(batch)
    def rows(*counts):
      for count in counts:
        yield {"images": np.zeros(8), "mask": np.arange(8) < count, "bad": np.arange(8) >= count}
    evals = {"val": (lambda: rows(8, 6, 2), {"split": "v"}), "v2": (lambda: rows(8), {})}
    evaluate = functools.partial(train.evaluate, jnp.float32(2), eval_step=eval_step, by_rows=shardings()[1])
    results, stop = evaluate(evals, prefix="ema/")
    self.assertEqual((list(results), stop), (["ema/val", "ema/v2"], 0))
    expected = dict(count=16, top1=37.5, top5=75, loss=1.125, bad=8, split="v")
    self.assertEqual(results["ema/val"] | expected, results["ema/val"])
    with patch(train, "received_signal", 15):
      self.assertEqual(evaluate(evals), ({}, 15))
    with self.assertRaisesRegex(train.UserError, "no image of val can be used"):
      evaluate({"val": (lambda: rows(0), {})})

  def test_bfloat16_gradient_of_eight_devices(self):
    """As far from float32 as on one device, 0.5 % of it here; on smooth pictures."""
    with mock.patch.dict(model.VARIANTS, narrow=(192, 2, 768, 3)):
      config = model.Config("narrow/16", 48, num_classes=10)
      params, batch = model.init_params(0, config), tiny_batch(32, 0, config)
      params["head"]["kernel"] = np.float32(default_rng(1).normal(0, 0.05, (192, 10)))
      batch["images"] = np.asarray(jax.image.resize(batch["images"][:, ::8, ::8], (32, 48, 48, 3), "cubic"))
      def grads(config, devices):
        replicated, split = shardings(jax.devices()[:devices])
        function = jax.jit(functools.partial(train.loss_and_grads, config=config), out_shardings=replicated)
        return jax.device_get(function(jax.device_put(params, replicated), train.put(batch, split))[1])
      exact = grads(config._replace(dtype="float32"), 1)
      error = norm(jax.tree.map(np.subtract, grads(config, 8), exact)) / norm(exact)
    self.assertBetween(error, 0.001, 0.01)

  def test_gradients_are_added_between_devices_in_float32(self):
    """As XLA's partitioner writes it: later, a CPU's compiler makes float32 of every sum, and rounds after it."""
    config, (replicated, split) = TINY._replace(dtype="bfloat16", num_classes=5), shardings()
    init, step = train.make_training(config, replicated, split, 10, warmup_steps=1)
    state = jax.device_put(init(random_params(config=config)), replicated)
    with folder() as root:
      step.lower(state, train.put(tiny_batch(config=config), split)).compile(compiler_options={
          "xla_dump_to": root, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "spmd-partition.*"})
      name, = [name for name in os.listdir(root) if "step" in name and "after_spmd-partitioning" in name]
      with open(f"{root}/{name}") as f:
        sums = re.findall(r" = (.*) all-reduce(?:-start)?\(", f.read())
    counts = collections.Counter(re.findall(r"(\w+)\[", " ".join(sums)))
    # Every gradient and the loss; integers are for host_metrics.
    self.assertEqual((set(counts), counts["f32"]), ({"f32", "s32"}, len(jax.tree.leaves(state["params"])) + 1))

  def test_only_what_the_command_line_starts_reads_flags(self):
    for module, allowed in ((train, {"main", "run", "instead_of_training"}), (model, {"main"}), (augment, {"main"}),
                            (input_pipeline, {"main"})):
      with open(module.__file__) as f:
        parts = [part for part in ast.parse(f.read()).body if isinstance(part, (ast.FunctionDef, ast.ClassDef))]
      reading = {part.name for part in parts for node in ast.walk(part)
                 if "FLAGS" in (getattr(node, "id", None), getattr(node, "attr", None))}
      self.assertEmpty(reading - allowed, module.__name__)

  def test_imports_have_no_effect(self):
    subprocess.run([sys.executable, "-c", """if True:
        import sys, signal, jax
        before = dict(jax.config.values)
        import model
        try:
          model.load("/nowhere.npz")
        except model.WeightsError:
          assert "tensorflow" not in sys.modules
        import train, input_pipeline, augment
        assert not train.FLAGS.is_parsed()
        assert jax.config.values == before
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        import jax._src.xla_bridge
        assert not jax._src.xla_bridge.backends_are_initialized()"""], cwd=HERE, check=True)


# --- augment.py ---


def numpy_op(name, image, magnitude, sign=1, center=(0, 0)):
  """The sixteen operations in float64, as the recipe defines them."""
  x, m, (H, W, _) = image.astype(np.float64), magnitude / 10, image.shape
  py, px = np.mgrid[:H, :W]
  pixels, shear, angle = sign * 100 * m * W / 224, sign * 0.3 * m, math.radians(sign * 30 * m)
  blend = lambda a, b: np.clip(a + (1.8 * m + 0.1) * (b - a), 0, 255).astype(np.uint8)

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
          lut = np.clip(np.concatenate([[0], ((np.cumsum(h) + step // 2) // step)[:-1]]), 0, 255)
          out[..., c] = lut[image[..., c]]
      return out
    case "invert":
      return 255 - image
    case "rotate":
      c, s, u, v = math.cos(angle), math.sin(angle), px - (W - 1) / 2, py - (H - 1) / 2
      return sample(c * u - s * v + (W - 1) / 2, s * u + c * v + (H - 1) / 2)
    case "posterize":
      shift = 8 - max(1, int(4 * m))
      return image >> shift << shift
    case "solarize":
      return np.where(image < int(256 * m) % 256, image, 255 - image)
    case "solarize_add":
      return np.where(image < 128, np.minimum(x + int(110 * m), 255), x)
    case "color":
      return blend((x @ [0.2989, 0.5870, 0.1140] / 255 * 255.5).astype(np.uint8)[..., None].astype(np.float64), x)
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
      return sample(px + shear * py, py)
    case "shear_y":
      return sample(px, py + shear * px)
    case "translate_x":
      return sample(px + pixels, py)
    case "translate_y":
      return sample(px, py + pixels)
    case "cutout":
      half, v, u = int(int(40 * m) * W / 224), py - center[0], px - center[1]
      return np.where(((-half <= v) & (v < half) & (-half <= u) & (u < half))[..., None], 128, image)


GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


class AugmentTest(parameterized.TestCase):

  def test_rows_by_hand(self):
    """On pictures of three equal rows, of which the second is checked; halves are rounded away from zero."""
    row, four = [0, 1, 100, 127, 128, 200, 255], [10, 20, 30, 40]
    for op, pixels, expected, *args in (
        ("invert", row, [255, 254, 155, 128, 127, 55, 0]), ("posterize", row, [0, 0, 96, 112, 128, 192, 240], 4),
        ("posterize", row, [0, 0, 0, 0, 128, 128, 128], 1), ("solarize", row, [0, 1, 100, 127, 127, 55, 0], 128),
        ("solarize", row, [255, 254, 155, 128, 127, 55, 0], 0),
        ("solarize_add", row, [110, 111, 210, 237, 128, 200, 255], 110),
        ("brightness", row, [0, 1, 190, 241, 243, 255, 255], 1.9),  # 1.9, 241.3, 243.2
        ("contrast", row, [0, 0, 13, 64, 66, 203, 255], 1.9),  # 196 + 1.9 (x - 196): 13.6, 64.9, 66.8, 203.6
        ("auto_contrast", [50, 60, 90, 100], [0, 51, 204, 255]),
        ("auto_contrast", [50] * 4, [50] * 4), ("translate_x", four, [20, 30, 40, 128], 1.0),
        ("translate_x", four, [128, 128, 10, 20], -2.0),
        ("translate_x", four, [20, 30, 40, 128], 0.5),  # 0.5 -> 1, 1.5 -> 2
        ("translate_x", four, [128, 20, 30, 40], -0.5),  # -0.5 -> -1, 0.5 -> 1, 1.5 -> 2, 2.5 -> 3
        ("shear_x", four, [20, 30, 40, 128], 1.0), ("translate_y", four, [128] * 4, 2.0)):
      image = tf.constant(np.tile(np.array(pixels, np.uint8)[None, :, None], (3, 1, 3)))
      same(getattr(augment, op)(image, *args)[1, :, 0], expected, op)

  def test_equalize_by_hand(self):
    # 510 pixels: 255 of 10, 255 of 20. step = (510 - 255) // 255 = 1; table: to 10 0, to 20 255, then 510 -> 255.
    image = np.repeat(np.array([10, 20], np.uint8), 255 * 3).reshape(2, 255, 3)
    self.assertEqual(np.unique(augment.equalize(tf.constant(image))).tolist(), [0, 255])
    flat = tf.fill([20, 20, 3], tf.constant(7, tf.uint8))
    same(augment.equalize(flat), flat)

  def test_squares_by_hand(self):
    square = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1) * np.ones(3, np.uint8)
    sheared = augment.shear_y(tf.constant(square), -1.0)[..., 0]
    same(sheared, [[1, 128, 128], [4, 2, 128], [7, 5, 3]])
    # out(x, y) = in(-y, x) about the centre: out's top row is in's right column... read from the left column upwards.
    same(augment.rotate(tf.constant(square), 90.0)[..., 0], [[3, 6, 9], [2, 5, 8], [1, 4, 7]])

  @parameterized.product(op=[op.__name__ for op in augment.OPS], magnitude=[0, 5, 10])
  def test_against_definitions(self, op, magnitude):
    rng = default_rng(0)
    noise = rng.integers(0, 256, (56, 56, 3))
    smooth = np.asarray(tf.image.resize(rng.integers(0, 200, (5, 5, 3)), (56, 56), "bicubic")).clip(0, 255)
    center = (50, 11)
    for image, sign in ((noise, 1), (noise, -1), (smooth, 1)):
      image = image.astype(np.uint8)
      function = getattr(augment, op)
      given = augment.arguments(magnitude, float(sign), tf.constant(center), 56)[function]
      got = tf.function(function, jit_compile=True)(tf.constant(image), *given).numpy().astype(int)
      expected = numpy_op(op, image, magnitude, sign, center).astype(int)
      differs = (got != expected).any(-1)
      if op in GEOMETRY:
        self.assertLessEqual(differs.mean(), 0.005)
      elif op in ("auto_contrast", "color", "contrast", "brightness", "sharpness"):
        self.assertLessEqual(abs(got - expected).max(), 1)
        self.assertLess(differs.mean(), 0.05)
      else:
        same(got, expected)

  def test_arguments_of_the_published_run(self):
    given = augment.arguments(10, -1.0, (3, 4), 224)
    expected = dict(rotate=-30, posterize=4, solarize=0, solarize_add=110, color=1.9, contrast=1.9, brightness=1.9,
                    sharpness=1.9, shear_x=-0.3, shear_y=-0.3, translate_x=-100, translate_y=-100, cutout=40)
    self.assertEqual({op.__name__: round(args[0], 9) for op, args in given.items() if args}, expected)
    self.assertEqual({op.__name__ for op in augment.OPS} - set(expected), {"auto_contrast", "equalize", "invert"})
    self.assertEqual(augment.arguments(10, 1.0, (3, 4), 112)[augment.cutout][0], 20)
    self.assertEqual(augment.arguments(5, 1.0, (3, 4), 112)[augment.translate_x][0], 25)
    self.assertEqual(augment.arguments(5, 1.0, (3, 4), 224)[augment.solarize][0], 128)
    for magnitude, bits in ((0, 1), (2.4, 1), (4.9, 1), (5, 2), (20, 8)):
      self.assertEqual(augment.arguments(magnitude, 1.0, (3, 4), 224)[augment.posterize], (bits,))

  def test_rand_augment_draws_every_op_sign_and_center_uniformly(self):
    def op(image, sign, center, number):
      drawn = [number, tf.cast(sign, tf.int32) + 1, center[0] * 8 + center[1]]
      return tf.cast(tf.broadcast_to(tf.stack(drawn), image.shape), tf.uint8)
    ops = tuple(functools.partial(op, number=i) for i in range(16))
    with patch(
        augment, "arguments", lambda magnitude, sign, center, size: {op: (sign, center) for op in ops}):
      def draw(i):
        draws = tf.random.stateless_uniform([1, 4], [0, i], alg="philox")
        return augment._layers(tf.zeros([4, 8, 3], tf.uint8), False, draws, 77)[0, 0]
      draws = np.array(list(tf.data.Dataset.range(4800).map(draw).as_numpy_iterator()))
    for column, choices in ((0, 16), (2, 4 * 8)):  # the operation, the centre
      counts, mean = np.bincount(draws[:, column], minlength=choices), 4800 / choices
      self.assertLen(counts, choices)
      self.assertLess(((counts - mean) ** 2 / mean).sum(), {16: 45, 32: 70}[choices])  # chi square: p < 1e-4
    self.assertAlmostEqual((draws[:, 1] == 2).mean(), 0.5, delta=0.04)

  def test_rand_augment_applies_layers_to_the_given_magnitude(self):
    image = tf.constant(default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    same(augment.rand_augment(image, (1, 2)), augment.rand_augment(image, (1, 2)))
    # Two layers are one layer on what the other left.
    draws = tf.random.stateless_uniform([2, 4], (5, 6), alg="philox")
    one = augment._layers(image, False, draws[:1], 10)
    same(augment.rand_augment(image, (5, 6), 2), augment._layers(one, False, draws[1:], 10))
    same(augment.rand_augment(image, (5, 6), 2, flip=True), augment.rand_augment(image[:, ::-1], (5, 6), 2))
    same(augment.rand_augment(tf.cast(image, tf.float32) + 0.9, (5, 6), 0), image)  # truncated

  def test_mixup(self):
    images = default_rng(0).uniform(-1, 1, (4, 2, 2, 3)).astype(np.float32)
    mixed, labels = augment.mixup(images, tf.eye(4), (3, 4), 0.2)
    a = labels[0, 0].numpy()
    for got, x in ((labels, np.eye(4)), (mixed, images)):
      close(got, a * x + (1 - a) * np.roll(x, 1, 0), atol=1e-6)

  def test_mixup_proportions_at_small_p(self):
    proportion = lambda i: augment.mixup(tf.zeros([2, 1, 1, 1]), tf.eye(2), tf.stack([7, i]), 0.2)[1][0]
    a, b = np.array(list(tf.data.Dataset.range(100_000).map(proportion).as_numpy_iterator())).T
    self.assertTrue(np.isfinite(a).all())
    close(a + b, 1, atol=1e-6)
    self.assertGreaterEqual(a.min(), 0.5)
    beta = default_rng(0).beta(0.2, 0.2, 100_000)
    for q in (0.1, 0.3, 0.5, 0.7):
      self.assertAlmostEqual(np.quantile(a, q), np.quantile(np.maximum(beta, 1 - beta), q), delta=0.01)
    # Of two draws that both underflow even in float64, one is 1e+300 times the other all the same.
    mixed = [augment.mixup(tf.zeros([2, 1]), tf.eye(2), (7, i), 1e-4)[1] for i in range(20)]
    self.assertGreater(min(float(labels[0, 0]) for labels in mixed), 0.99)


# --- input_pipeline.py ---


class Numbers(tfds.core.GeneratorBasedBuilder):
  """50 + 13 noisy JPEGs of many shapes; the label is the picture's number modulo 3, "many" holds 0 to 2 labels."""
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    label = tfds.features.ClassLabel(names=["zero", "one", "two"])
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(encoding_format="jpeg"), "label": label, "many": tfds.features.Sequence(label)}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(50), "validation": self._generate_examples(13)}

  def _generate_examples(self, count):
    rng = default_rng(count)
    for i in range(count):
      image = rng.integers(0, 256, (*rng.integers(20, 60, 2), 3)).astype(np.uint8)
      yield i, {"image": image, "label": i % 3, "many": [[], [i % 3], [0, 2]][i % 3]}


def setUpModule():
  global DATA, NUMBERS
  DATA = folder()
  NUMBERS = Numbers(data_dir=DATA.name)
  NUMBERS.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))


def tearDownModule():
  DATA.cleanup()


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


def picture(size=(40, 30), mode="RGB", kind="JPEG", color=None):
  from PIL import Image
  out = io.BytesIO()
  Image.new(mode, size, color).save(out, kind)
  return out.getvalue()


def ids(records):
  return [input_pipeline.record_name(x) for x in records]


class InputTest(parameterized.TestCase):

  def train_batches(self, batch_size=8, dataset=None, split="train", **kwargs):
    kwargs = dict(image_size=32, dtype="float32", seed=3) | kwargs
    return input_pipeline.train_batches(dataset or NUMBERS, split, batch_size, **kwargs)

  def eval_batches(self, batch_size, dataset=None, split="validation", **kwargs):
    kwargs = dict(image_size=16, dtype="float32") | kwargs
    return input_pipeline.eval_batches(dataset or NUMBERS, split, batch_size, **kwargs)

  def refused(self, message):
    return self.assertRaisesRegex(input_pipeline.DatasetError, message)

  @cases(7, 4096)
  def test_every_example_once_per_epoch_in_an_order_of_its_own(self, window):
    def order(seed, count, **kwargs):
      return ids(input_pipeline.shuffled_records(NUMBERS, "train[:90%]", seed, **kwargs).take(count))
    with patch(input_pipeline, "window_size", lambda *_: window):
      stream = order(0, 3 * 45)
      epochs = [stream[:45], stream[45:90], stream[90:]]
      for epoch in epochs:
        self.assertEqual((len(set(epoch)), set(epoch)), (45, set(epochs[0])))
      self.assertNotIn(epochs[0], (epochs[1], sorted(epochs[0]), order(1, 45)))
      files = [[re.search("-0000(.)-of-", name)[1] for name in epoch] for epoch in epochs]
      self.assertGreater(len(set(files[0][:20])), 1)
      self.assertGreater(len({epoch[0] for epoch in files}), 1)
      self.assertEqual(order(0, 35, start=100), stream[100:])

  @cases(
      ("train", 1_281_167, 110_000, 4096), ("train[:99%]", 1000, 2 ** 17, 4096), ("train", 1000, 2 ** 17 + 1, 4095),
      ("train", 3, 2 ** 30, 1), ("train", 10, 0, 4096),
      ("train+test", 3, 2_000_000, 429))  # with as many of 500,000 bytes
  def test_window_size(self, split, count, size, expected):
    part = lambda size: types.SimpleNamespace(num_examples=count, num_bytes=count * size)
    info = types.SimpleNamespace(splits={"train": part(size), "test": part(500_000)})
    self.assertEqual(input_pipeline.window_size(types.SimpleNamespace(name="x", info=info), split), expected)

  def test_splits(self):
    parts = [ids(input_pipeline.read_records(NUMBERS, split)) for split in ("train[:90%]", "train[90%:]", "validation")]
    self.assertEqual(([len(part) for part in parts], len(set(sum(parts, [])))), ([45, 5, 13], 63))
    self.assertEqual(input_pipeline.split_size(NUMBERS, "train[90%:]+validation"), 18)
    for split in ("test", "train[:0]", "train[:101]", "tr ain", "all[:50%]"):
      with self.refused(r"unknown or empty; it has train \(50\), validation \(13\)"):
        input_pipeline.split_size(NUMBERS, split)

  def test_a_batch_is_a_function_of_its_number(self):
    batches = take(self.train_batches(), 14)  # two epochs and a bit
    self.assertEqual(batches[0]["images"].shape, (8, 32, 32, 3))
    self.assertLessEqual(abs(batches[0]["images"]).max(), 1 + 1e-6)
    close(batches[0]["labels"].sum(1), 1, rtol=1e-6)
    self.assertGreater(len({x["labels"][x["labels"] > 0].min() for x in batches}), 7)  # each is mixed by its own draw
    pairs = [(batches[start], next(self.train_batches(start_step=start))) for start in (3, 6, 13)]
    with patch(input_pipeline, "THREADS", 1):
      pairs += zip(batches, take(self.train_batches(), 14))
    for count in (2, 4):
      shares = [take(self.train_batches(process_index=i, process_count=count), 3) for i in range(count)]
      pairs += zip(batches, [{key: np.concatenate([share[key] for share in step]) for key in step[0]}
                             for step in zip(*shares)])
    for one, other in pairs:
      self.assertEqual((one.keys(), sum(one["bad"])), (other.keys(), 0))
      for key in one:
        same(one[key], other[key])
    self.assertGreater(abs(next(self.train_batches(seed=4))["images"] - batches[0]["images"]).max(), 0.1)

  def test_pictures_and_labels_belong_together(self):
    plain = functools.partial(self.train_batches, 50, randaug_layers=0, mixup_p=0)
    batch, half, other = map(next, (plain(), plain(dtype="bfloat16"), plain(label_names=("two", "zero", "one"))))
    self.assertEqual(half["images"].dtype, jnp.bfloat16)
    close(np.float32(half["images"]), batch["images"], atol=2 ** -9)
    records = input_pipeline.shuffled_records(NUMBERS, "train", 3).take(50)
    images, labels = zip(*map(input_pipeline.record_reader(NUMBERS), records))
    same(batch["labels"], np.eye(3)[np.array(labels)])
    same(other["labels"], np.eye(3)[(np.array(labels) + 1) % 3])  # a model's classes in another order
    image = input_pipeline.train_image(images[7], 3, 7, 32, 0)
    close(batch["images"][7], image.numpy() / 127.5 - 1, atol=1e-6)

  def test_sets_of_labels(self):
    reader = input_pipeline.record_reader
    def expected(records):
      return [[[0, 0, 0], [0, 1, 0], [1, 0, 1]][reader(NUMBERS)(record)[1]] for record in records]
    batch, = self.eval_batches(16, label="many")
    same(batch["labels"], expected(input_pipeline.read_records(NUMBERS, "validation")) + [[0, 0, 0]] * 3)
    same(batch["mask"], np.arange(16) < 13)  # a row without a label is a row all the same
    with patch(input_pipeline, "record_reader", lambda dataset: reader(dataset, "many")):
      batch = next(self.train_batches(50, mixup_p=0))
    same(batch["labels"], expected(input_pipeline.shuffled_records(NUMBERS, "train", 3).take(50)))

  @cases((4, 1, 1), (8, 1, 2), (16, 1, 1), (4, 2, 1), (8, 2, 2), (16, 2, 1), (8, 4, 1), (32, 4, 2))
  def test_evaluation_counts_every_image_once(self, batch_size, count, passes):
    shares = [list(self.eval_batches(batch_size, process_index=i, process_count=count, passes=passes))
              for i in range(count)]  # some have nothing of the last batch
    n = -(-13 * passes // batch_size)
    self.assertEqual({len(share) for share in shares}, {n})
    images, labels, mask, bad = (np.concatenate([share[k][key] for k in range(n) for share in shares])
                                 for key in ("images", "labels", "mask", "bad"))
    same(mask, np.arange(n * batch_size) < 13 * passes)
    self.assertEqual((labels[~mask].sum(), bad.sum()), (0, 0))
    records = [*map(input_pipeline.record_reader(NUMBERS), input_pipeline.read_records(NUMBERS, "validation"))] * passes
    for image, row, (encoded, label) in zip(images, labels, records):
      close(image, input_pipeline.eval_image(encoded, 16).numpy() / 127.5 - 1, atol=1e-6)
      same(row, np.eye(3)[label.numpy()])

  def test_random_crops(self):
    """Area and aspect ratio of the boxes, from pictures whose pixels say where they are; a JPEG's box is the same."""
    y, x = np.mgrid[:200, :250]
    image = np.stack([y, x, (y + x) // 2], -1).astype(np.uint8)
    jpeg, png = tf.io.encode_jpeg(image, quality=95), tf.io.encode_png(image)
    decoded = tf.io.encode_png(tf.io.decode_jpeg(jpeg))
    areas, ratios = [], []
    for i in range(300):
      crop = input_pipeline.decode_random_crop(png, (0, i)).numpy()
      h, w, _ = crop.shape
      self.assertEqual((np.ptp(crop[..., 0]) + 1, np.ptp(crop[..., 1]) + 1), (h, w))  # a box of the picture
      areas.append(h * w / (200 * 250))
      ratios.append(w / h)
      if i < 5:
        got, expected = (input_pipeline.decode_random_crop(x, (0, i)).numpy().astype(int) for x in (jpeg, decoded))
        close(got, expected, atol=3)  # the decoder smooths colours, on the box's border without what is beyond it
        same(got[2:-2, 2:-2], expected[2:-2, 2:-2])
    for value, low, high in ((min(areas), 0.049, 0.12), (max(areas), 0.8, 1), (min(ratios), 0.74, 0.8),
                             (max(ratios), 1.25, 1.36)):
      self.assertBetween(value, low, high)

  def test_train_image_truncates_and_flips(self):
    columns = default_rng(0).integers(0, 256, (1, 120, 1)).astype(np.uint8)
    png, flips = tf.io.encode_png(np.tile(columns, (120, 1, 3))), 0
    for i in range(60):
      row = input_pipeline.train_image(png, 0, i, 32, 0).numpy()[5, :, 1].astype(int)
      crop = input_pipeline.decode_random_crop(png, input_pipeline.seed_for("crops", 0, i)).numpy()[0, :, 0]
      # Bilinear without antialiasing: output pixel j reads at (j + 0.5) * width / 32 - 0.5.
      where = ((np.arange(32) + 0.5) * len(crop) / 32 - 0.5).clip(0, len(crop) - 1)
      expected = np.floor(np.interp(where, np.arange(len(crop)), crop) + 1e-4)
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
      edges = np.arange(n_out + 1) * n_in / n_out
      overlap = np.minimum(edges[1:, None], np.arange(1, n_in + 1)) - np.maximum(edges[:-1, None], np.arange(n_in))
      return overlap.clip(0) * n_out / n_in

    small = np.einsum("yh,xw,hwc->yxc", area(H, h), area(W, w), image.astype(np.float64))
    y, x = (h - 32) // 2, (w - 32) // 2
    got = input_pipeline.eval_image(tf.io.encode_png(image), 32).numpy()
    differs = abs(got - np.floor(small + 1e-3)[y:y + 32, x:x + 32])
    self.assertTrue(differs.max() <= 1 and (differs > 0).mean() < 0.05)  # 29.999 in float32 is truncated to 29

  def test_folder_of_any_pictures(self):
    colors = {  # file: mode and colour of what is in it, the colour that the model sees
        "cat/a.jpg": ("RGB", (200, 0, 0), (200, 0, 0)), "cat/b.PNG": ("L", 100, (100, 100, 100)),
        "dog/c.png": ("RGBA", (0, 200, 0, 50), (0, 200, 0)), "dog/d.jpeg": ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        "dog/x.jpg/deep/e.gif": ("RGB", (9, 9, 9), (9, 9, 9)), "eel/f.webp": ("RGB", (0, 0, 250), (0, 0, 250)),
        "eel/g\udce9.bmp": ("RGB", (1, 2, 3), (1, 2, 3)), "eel/h.jpg": ("L", 30, (30, 30, 30))}
    files = {f"train/{file}": picture(mode=mode, kind={"jpg": "JPEG"}.get(file[-3:], file.split(".")[-1]), color=color)
             for file, (mode, color, _) in colors.items()}
    others = """val/cat/n.jpg .git/cat/o.jpg train/.ipynb_checkpoints/p.jpg train/cat/.cache/q.jpg train/r.jpg
        train/cat/s.txt train/eel/t.txt"""
    with folder() as root:
      os.makedirs(f"{root}/train/empty")
      data = input_pipeline.open_dataset(write_folder(root, files | dict.fromkeys(others.split(), picture())))
      classes = ("cat", "dog", "eel", "empty")
      self.assertEqual(input_pipeline.class_names(data), classes)
      self.assertEqual({split: info.num_examples for split, info in data.info.splits.items()}, {"train": 8, "val": 1})
      notes = "\n".join(input_pipeline.notes(data))
      for note in ("train has no picture of empty", "val has no picture of dog, eel, empty", "2 .txt of train",
                   "1 in train, but in no CLASS"):
        self.assertIn(note, notes)
      records = input_pipeline.read_records(data, "train")
      for record, batch in zip(records, self.eval_batches(1, data, "train"), strict=True):
        file = os.path.relpath(os.fsdecode(record["path"].numpy()), f"{root}/train")
        close((batch["images"][0, 8, 8] + 1) * 127.5, colors[file][2], atol=3, err_msg=file)
        same(batch["labels"], [[file.split("/")[0] == name for name in classes]])

  def test_folders_have_the_order_of_image_folder_and_a_split_opens_its_own_files(self):
    with folder() as root:
      name = write_folder(root, {f"train/{i % 3}{'ab'[i % 2]}/{i}.jpg": picture() for i in range(60)})
      data, other = input_pipeline.open_dataset(name), tfds.ImageFolder(root).as_dataset(split="train")
      files, *parts = (ids(input_pipeline.read_records(data, f"train{part}")) for part in ("", "[:90%]", "[90%:]"))
      self.assertEqual(files, [x["image/filename"].numpy().decode() for x in other])
      self.assertEqual(parts, [files[:54], files[54:]])
      for file in parts[0]:
        os.remove(file)
      self.assertEqual(sum(batch["mask"].sum() for batch in self.eval_batches(4, data, "train[90%:]")), 6)
      take(self.train_batches(4, data, "train[90%:]"), 3)

  def test_imagenet_in_folders_has_the_labels_of_tfds(self):
    with folder() as root:
      names = tuple(tfds.builder("imagenet2012", data_dir=root).info.features["label"].names)
      self.assertEqual((len(names), names[0], names[-1]), (1000, "n01440764", "n15075141"))
      data = input_pipeline.open_dataset(write_folder(root, {f"train/{name}/{name}_1.JPEG": b"" for name in names}))
      self.assertEqual(input_pipeline.class_names(data), names)

  BAD = {
      "empty.jpg": b"", "text.jpg": b"no picture", "truncated.jpg": picture((300, 300))[:400],
      "truncated.png": picture((300, 300), kind="PNG")[:100],
      # 60,000 x 60,000 pixels declared in a few bytes
      "bomb.jpg": re.sub(b"(?<=\xff\xc0\0\x11\x08)....", b"\xea\x60" * 2, picture(), flags=re.S),
      "bomb.png": picture(kind="PNG")[:16] + (60_000).to_bytes(4, "big") * 2 + picture(kind="PNG")[24:],
      "dangling.jpg": "/nowhere.jpg", "loop.jpg": "loop.jpg", "caf\udce9.jpg": b""}  # not UTF-8: Latin-1

  @cases(*BAD)
  def test_bad_images(self, bad):
    with folder() as root:
      good = {f"train/c{i % 2}/{i}.jpg": picture(color=(40 * i, 0, 0)) for i in range(5)}
      data = input_pipeline.open_dataset(write_folder(root, good | {f"train/c0/{bad}": self.BAD[bad]}))
      for batches in (*map(self.train_batches, (3, 1), (data, data)), self.eval_batches(4, data, "train")):
        with self.refused(f"bad record .*/c0/{bad}: .*--skip_bad_images".replace("\udce9", r"\\xe9")):
          take(batches, 6)
      for count in (1, 2):
        share = lambda i: dict(process_index=i, process_count=count, skip_bad_images=True)
        batches = [batch for i in range(count)
                   for batch in take(self.train_batches(6, data, randaug_layers=0, mixup_p=0, **share(i)), 10)]
        self.assertEqual(sum(batch["bad"].sum() for batch in batches), 10)  # ten epochs of six
        for batch in batches:
          same(batch["labels"].sum(1), 1)
          self.assertLess(batch["images"][..., 1].max(), -0.9)  # no grey or zero image: all are red
        batches = [batch for i in range(count) for batch in self.eval_batches(4, data, "train", **share(i))]
        self.assertEqual([sum(batch[key].sum() for batch in batches) for key in ("bad", "mask", "labels")], [1, 5, 5])

  def test_a_batch_without_a_good_row(self):
    with folder() as root:
      data = input_pipeline.open_dataset(write_folder(root, {f"train/c/{i}.jpg": b"" for i in range(4)}))
      with self.refused("no record of a batch can be used"):
        next(self.train_batches(3, data, skip_bad_images=True))
      batch, = self.eval_batches(4, data, "train", skip_bad_images=True)
      self.assertEqual((batch["bad"].sum(), batch["mask"].sum()), (4, 0))

  def test_a_label_out_of_range_is_a_bad_record(self):
    with patch(input_pipeline, "label_positions", lambda *_: [0, 1]):  # 4 of 13 labels are 2
      with self.refused(r"bad record .*numbers-validation.*#.*indices = 2 is not in \[0, 2\)"):
        list(self.eval_batches(16))
      batch, = self.eval_batches(16, skip_bad_images=True)
      self.assertEqual((batch["bad"].sum(), batch["mask"].sum()), (4, 9))

  def test_a_long_thin_picture_is_not_blown_up(self):
    with self.assertRaisesRegex(tf.errors.InvalidArgumentError, "image too large"):  # 256 x 15,360,000 pixels
      input_pipeline.eval_image(tf.io.encode_png(np.zeros((1, 60_000, 3), np.uint8)))

  def test_damaged_file(self):
    with folder() as root:
      builder = Numbers(data_dir=root)
      builder.download_and_prepare()
      path, = builder.data_path.glob("*train*")
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 255
      path.write_bytes(data)
      for skip in (False, True):  # all that follows would move
        with self.refused("corrupted record at [0-9]+: look at the files of the data set, or prepare it again"):
          take(self.train_batches(10, builder, skip_bad_images=skip), 5)

  @cases(
      (None, [0, 1, 2]), (["zero", "one", "two"], [0, 1, 2]), (["two", "zero", "one"], [1, 2, 0]),
      ("012", [0, 1, 2]), ("210", [0, 1, 2]), (["zero", "one", "cat"], "3; only in the data set: two; .* model: cat"),
      (["zero", "one"], "2; only in the data set: two; .* model: none"))
  def test_label_positions(self, names, expected):
    """The same names in another order are mapped, numbers count by their order, other names are refused."""
    for label in ("label", "many"):
      if isinstance(expected, list):
        self.assertEqual(input_pipeline.label_positions(NUMBERS, names, label), expected)
      else:
        with self.refused(f"numbers has 3 classes, the model {expected}"):
          input_pipeline.label_positions(NUMBERS, names, label)

  def test_dataset_errors(self):
    with folder() as root, contextlib.chdir(root):
      write_folder(root, {"two/train/a/1.jpg": b"", "flat/train/1.jpg": b""})
      for name, message in (
          ("imagenet2012", "not prepared in .*--manual_dir.*--dataset=patterns.*ILSVRC2012_img_train.tar"),
          ("./nowhere", "no such folder"),
          ("cifar10:9.9.9", "no such data set.*9.9.9.*version"),
          ("two", "did you mean --dataset=./two"), ("glue/cola", "not prepared in .*--dataset=glue/cola"),
          ("./two/train/a/", "no images found"), ("./flat", "no images found.*1 in train, but in no CLASS")):
        with self.refused(message):
          input_pipeline.open_dataset(name, root)
      with self.refused("--manual_dir=/nowhere: Manual directory.*ILSVRC2012_img_train.tar"):
        input_pipeline.open_dataset("imagenet2012", root, prepare=True, manual_dir="/nowhere")
    with self.refused("no classes in a feature 'name'; it has image, label, many"):
      input_pipeline.class_names(NUMBERS, "name")
    self.assertEqual(input_pipeline.class_names(NUMBERS, "many"), ("zero", "one", "two"))
    self.assertEqual([input_pipeline.is_set(NUMBERS, label) for label in ("label", "many")], [False, True])
    self.assertEmpty(input_pipeline.notes(NUMBERS))
    with patch(type(NUMBERS.info), "disable_shuffling", True):
      self.assertRegex(input_pipeline.notes(NUMBERS)[0], "numbers is stored in the order in which .*prepare it again")


# --- train.py: checkpoints, weights, runs ---

COLORS = ("red", "green", "blue")


def printed():
  return contextlib.redirect_stdout(io.StringIO())


def noise_folder(root):
  """A folder of noise in three classes, which are its mean colours, so that they can be learnt."""
  rng, files = default_rng(0), {}
  for split, count in (("train", 40), ("validation", 13)):
    for i in range(count):
      image = rng.integers(0, 120, (30 + i, 40, 3))
      image[..., i % 3] += 100
      files[f"{split}/{COLORS[i % 3]}/{i}.png"] = tf.io.encode_png(image.astype(np.uint8)).numpy()
  return write_folder(f"{root}/data", files)


def run(*arguments):
  """`train.py` with these arguments, in this process: what it printed."""
  with flagsaver.flagsaver(), printed() as out, patch(signal, "signal"), patch(train, "received_signal", 0):
    try:
      train.run(flags.FLAGS(["train.py", *arguments]))
    except SystemExit as error:
      out.write(f"\nexit: {error.code}")
  return out.getvalue()


def refused(*arguments):
  """The error of `run`, which must be its last line."""
  line = run(*arguments).partition("\nexit: Error: ")[2]
  assert line and "\n" not in line, line
  return line


def losses(log):
  return dict(re.findall(r"^step (\d+)/.* loss (\S+) ", log, re.M))


def last_path(workdir):
  return train.checkpoints(workdir)[-1][1]


def weights_file(root, of=TINY, change={}, **about):
  """Random weights, some changed, or left out for None: a foreign file, or one that says things, as ours."""
  flat = {name: x for name, x in (model.flatten(random_params(config=of)) | change).items() if x is not None}
  np.savez(f"{root}/weights.npz", **{"params/" * bool(about) + name: x for name, x in flat.items()}, **about)
  return f"{root}/weights.npz"


class Case(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = self.create_tempdir().full_path
    self.workdir = f"{self.root}/run"

  def steps(self):
    return [step for step, _ in train.checkpoints(self.workdir)]

  def arrays(self):
    return model.read_npz(last_path(self.workdir))


class CheckpointTest(Case):

  def state(self, seed=0):
    params = random_params(seed)
    mean = jax.tree.map(lambda x: (x / 3).astype(jnp.bfloat16), params)
    return {"params": params, "opt_state": ((), {"mu": mean}, np.int32(seed + 1)), "step": np.int32(seed)}

  def save(self, step, last=False, keep_every=0, **recipe):
    os.makedirs(self.workdir, exist_ok=True)
    about = {"label_names": np.array(["a", "b"]), "flags": np.array(json.dumps(recipe))}
    with printed() as out:
      train.save_checkpoint(self.workdir, self.state(step) | about, keep_every, last)
    return out.getvalue()

  def restore(self, state=None, allow_changes=False, **recipe):
    defaults = {"lr": 1, "mixup": 0.2, "data_order": 1}
    with printed() as out:
      state, path = train.restore_checkpoint(self.workdir, state or self.state(), defaults | recipe, defaults,
                                             allow_changes)
    self.assertEqual(path and int(path[-12:-4]), state["step"] or None)
    return state, out.getvalue()

  def test_round_trip(self):
    self.assertEqual(int(self.restore()[0]["step"]), 0)
    self.save(7)
    (state, said), expected = self.restore(), self.state(7)
    self.assertIn("Resuming after step 7", said)
    jax.tree.map(same, state, expected)
    self.assertEqual(*[[x.dtype for x in jax.tree.leaves(tree)] for tree in (state, expected)])
    with np.load(last_path(self.workdir)) as file:  # the two lines of the README
      same(file["params/head/kernel"], expected["params"]["head"]["kernel"])
      self.assertEqual(file["label_names"].tolist(), ["a", "b"])

  def test_last_two_and_multiples_are_kept(self):
    self.workdir += "[1]*"  # looks like a pattern, but is none
    write_folder(self.workdir, {"checkpoint_old.npz": b""})
    for step in range(1, 9):
      self.save(step, keep_every=3)
    self.assertEqual(self.steps(), [3, 6, 7, 8])
    self.save(2)  # with later ones that are damaged, say
    self.assertEqual(self.steps(), [2, 7, 8])

  @cases("cut", "empty", "text", "flipped bit", "foreign", "pickle")
  def test_damaged_file_is_named_and_the_one_before_used(self, damage):
    self.save(1)
    self.save(2)
    path = last_path(self.workdir)
    with open(path, "rb") as f:
      data = bytearray(f.read())
    data[len(data) // 2] ^= 1
    with open(path, "wb") as f:
      if damage in ("foreign", "pickle"):
        np.savez(f, step=np.array(2 if damage == "foreign" else [{}]), flags=np.array("none"))
      f.write({"cut": data[:-100], "text": b"hello", "flipped bit": data}.get(damage, b""))
    state, said = self.restore()
    self.assertEqual(int(state["step"]), 1)
    self.assertRegex(said, f"{path}.*Trying the previous one.\n.*Resuming after step 1")
    os.remove(train.checkpoints(self.workdir)[0][1])
    self.assertRaisesRegex(train.UserError, f"No checkpoint in {self.workdir} can be read; remove", self.restore)

  def test_a_crash_at_any_byte_leaves_the_last_good_one(self):
    class Crashing(io.FileIO):
      def write(self, data):
        super().write(data[:limit])
        raise OSError("power cut")
    crashes = [("GFile", lambda path, mode: Crashing(path, mode[0]))] * 4
    crashes.append(("rename", mock.Mock(side_effect=OSError("power cut"))))
    self.save(1)
    size = os.path.getsize(last_path(self.workdir))
    for crash, limit in zip(crashes, (0, 1, size // 3, size - 1, size)):
      with patch(tf.io.gfile, *crash):
        self.assertRegex(self.save(2), "power cut.; the previous one is kept, and the run goes on")
        self.assertRaisesRegex(train.UserError, "power cut.; the previous one is kept", self.save, 2, last=True)
      self.assertEqual(int(self.restore()[0]["step"]), 1)
      self.assertEqual(os.listdir(self.workdir), ["checkpoint_00000001.npz"])  # what is half written takes no place
    self.save(2)
    self.assertEqual(int(self.restore()[0]["step"]), 2)

  def test_another_recipe_is_refused_with_the_difference(self):
    self.save(1, lr=1, seed=5, grad_accum=4)  # the last is no recipe any more
    self.assertEqual(int(self.restore(seed=5)[0]["step"]), 1)  # mixup was added since
    for recipe, message in ((dict(seed=5, mixup=0.3), r"--mixup=0.2 \(now 0.3\)"), ({}, r"--seed=5 \(now unknown\)"),
                            (dict(seed=5, lr=2), r"--lr=1 \(now 2\).*--allow_changes")):
      self.assertRaisesRegex(train.UserError, message, self.restore, **recipe)
      state, _ = self.restore(allow_changes=True, **recipe)
      self.assertEqual(int(state["step"]), 1)
    state["params"]["head"]["bias"] = np.zeros(4, np.float32)
    message = "does not fit the model: params/head/bias missing, or of another shape"
    self.assertRaisesRegex(train.UserError, message, self.restore, state, seed=5)

  POSITION = "pos_embedding", "Transformer/posembed_input/pos_embedding"
  NAMES = {"today": [], "stacked": [], "bare posemb": [("pos_embedding", "Transformer/pos_embedding")],
           "2020": [POSITION], "augreg": [("DotProductAttention_0", "DotProductAttention_1"),
                                          ("LayerNorm_1/", "LayerNorm_2/"), ("MlpBlock_0", "MlpBlock_3"), POSITION]}

  @parameterized.product(names=[*NAMES], flavour=[("", "float32"), ("", "float16"), ("params/", "bfloat16"),
                                                  ("opt/target/", "float32")])
  @mock.patch.dict(model.VARIANTS, two=(16, 2, 32, 2))
  def test_families_of_names(self, names, flavour):
    (prefix, dtype), path = flavour, f"{self.root}/weights.npz"
    for posemb, pool, head, C in itertools.product(("sincos2d", "learned"), ("gap", "cls"), ("mlp", "linear"), (0, 3)):
      config = TINY._replace(variant="two/8", posemb=posemb, pool=pool, head=head, num_classes=C, dtype="bfloat16")
      flat = {name: x.astype(dtype) for name, x in model.flatten(random_params(config=config)).items()
              if C or not name.startswith("head/")}
      stored = dict(flat)
      if names == "augreg" and posemb == "learned" and pool == "cls":  # [cls] has a position, too
        stored["pos_embedding"] = np.pad(flat["pos_embedding"], ((0, 0), (1, 0), (0, 0)), constant_values=0.125)
        flat["cls"] = flat["cls"].astype(np.float32) + 0.125
      for name in [name for name in flat if names == "stacked" and "block_0" in name]:
        pair = stored.pop(name), stored.pop(name.replace("block_0", "block_1"))
        stored[name.replace("block_0", "block")] = np.stack(pair)
      for old in self.NAMES[names]:
        stored = {name.replace(*old): x for name, x in stored.items()}
      more = {"opt/state/step": np.array(3), "extra": np.zeros(2)} if prefix == "opt/target/" else {}
      np.savez(path, **{prefix + name: x for name, x in stored.items()}, **more)
      params, info = model.load(path)
      size = 224 if posemb == "sincos2d" else 16  # the former does not show it
      self.assertEqual(info, model.Info(config._replace(image_size=size), tuple("012"[:C])))
      params = model.flatten(params)
      self.assertEqual(set(params), set(flat), config)
      for name, x in params.items():
        self.assertEqual(x.dtype, np.float32)
        close(x, flat[name].astype(np.float32), 0 if dtype == "float32" else 0.01, err_msg=name)

  @cases(
      ({}, ""), ({"rope": True}, "rope"), ({"pool": "max"}, "pool=max"), ({"variant": "XL/8"}, "variant=XL/8"),
      ({"variant": 8}, ""), ({"posemb": "learned"}, "pos_embedding missing"), ({"image_size": "16"}, ""),
      ({"head": "linear"}, "pre_logits/bias unknown"), ({"image_size": 20}, "=20"), ({"dtype": "int8"}, "int8"))
  def test_what_a_checkpoint_says_of_itself(self, change, message):
    said = TINY._replace(image_size=24)  # which no array shows
    path = weights_file(self.root, config=np.array(json.dumps(said._asdict() | change)), step=np.array(5),
                        label_names=np.array(["a", "b", "c"]), flags=np.array('{"lr": 3}'))
    if change:  # adopted by its shapes, it would be another model
      self.assertRaisesRegex(model.WeightsError, f"^--init={path}.*{message}.*$", model.load, path)
    else:
      self.assertEqual(model.load(path)[1], model.Info(said, ("a", "b", "c"), {"lr": 3}, 5))

  @cases(
      ({"pos_embedding": np.float32(1)}, "no ViT in it"), ({"embedding/kernel": np.zeros(3)}, "no ViT in it"),
      ({"head/bias": np.float32(1)}, "no ViT in it"), ({"pre_logits/kernel": np.float32(1)}, "does not fit"),
      ({"Transformer/encoderblock/LayerNorm_0/bias": np.float32(1)}, "does not fit"),
      ({"head/kernel": None, "head/bias": None}, "head"),
      # All that is wrong is listed.
      ({"embedding/bias": None, "Transformer/encoder_norm/bias": np.zeros(5, np.float32), "surprise": np.zeros(1),
        "pre_logits/bias": np.zeros(32, np.int32), "head/bias": np.float32([0, np.nan, 0])},
       r"encoder_norm/bias float32 \(5,\), expected floats \(32,\).*embedding/bias missing.*head/bias not finite.*"
       r"pre_logits/bias int32 \(32,\), expected floats \(32,\).*surprise unknown"),
      *(({}, f"^{flag} contradicts --init.*, which holds {flag[2:6]}", flag)
        for flag in ("--head=linear", "--pool=cls", "--posemb=learned", "--variant=S/16")))
  def test_refused_weights(self, change, message, flag="--image_size=16"):
    path = weights_file(self.root, change=change)
    for task in ("--eval_only", f"--predict={self.root}/x.png"):
      said = refused(f"--init={path}", "--image_size=16", flag, task)
      self.assertRegex(said, message)
      self.assertIn("--init" if flag in said else path, said)

  def test_resample_posemb(self):
    grid = np.array([0, 4, 8, 12], np.float32).reshape(1, 4, 1)  # corners stay corners, with the halves between
    close(model.resample_posemb(grid, 9)[0, :, 0], [0, 2, 4, 4, 6, 8, 8, 10, 12])
    close(model.resample_posemb(grid, 4), grid)


class RunTest(Case):
  # Another value of a flag of the optimiser is another program to compile: runs have the same where they can.

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.shared = tempfile.mkdtemp()
    cls.data = noise_folder(cls.shared)

  def flags(self, *more):
    return [f"--dataset={self.data}", f"--workdir={self.workdir}", "--variant=mu/8", "--image_size=16",
            "--batch_size=8", "--epochs=4", "--train_split=train", "--eval=validation", "--warmup_steps=2",
            "--dtype=float32", "--log_every=1", "--checkpoint_every=5", *more]

  def trained(self):
    """The log and the last checkpoint of a run that several tests look at."""
    if not hasattr(self, "log"):
      RunTest.log = run(*self.flags(f"--workdir={self.shared}/run", "--epochs=24", "--lr=0.01", "--eval_every=50"))
    return self.log, last_path(f"{self.shared}/run")

  def read_log(self, workdir):
    with open(f"{workdir}/log.jsonl") as f:
      lines = [json.loads(line) for line in f]
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]

  def test_the_log_of_a_run(self):
    (log, path), workdir = self.trained(), f"{self.shared}/run"
    self.assertNotIn("could not be written", log)
    self.assertRegex(log, f"120 steps of 8, 40 images an epoch.*{workdir}\\b.*\nstep 1/120 .* compiled and done after ")
    self.assertRegex(log, r"step 120/120  epoch 24.00  loss \S+  lr \S+  grad \S+  \d+ images/s  waiting for data \d+%")
    self.assertRegex(log, f"{path}.*python train.py --init={path} --predict .*\n$")
    with open(f"{workdir}/eval.json") as f:
      result = json.load(f)["validation"]
    about = dict(bad=0, dataset=self.data, split="validation", image_size=16, dtype="float32", step=120, weights=path)
    self.assertEqual(result | about, result)
    self.assertGreater(result["top1"], 90)
    self.assertRegex(log, rf"validation .* loss {result['loss']:.4f}   {result['count']} images\n.*\n$")
    lines, evaluations = self.read_log(workdir)
    last = {f"validation/{key}": result[key] for key in ("count", "top1", "top5", "loss")} | {"step": 120}
    self.assertEqual(evaluations[2:], [last])
    self.assertLen(lines, 120)
    self.assertEqual({str(line["step"]): f"{line['loss']:.4f}" for line in lines}, losses(log))
    tags = {value.tag for name in tf.io.gfile.glob(f"{workdir}/events*")
            for event in tf.compat.v1.train.summary_iterator(name) for value in event.summary.value}
    self.assertLessEqual({"loss", "learning_rate", "grad_norm", "param_norm", "epoch", "images_per_second", "data_wait",
                          "bad_images", "validation/top1"}, tags & (lines[60].keys() | last.keys()))

  def test_evaluate(self):
    log, path = self.trained()
    line = lambda log: re.findall("validation +(top-1.*)", log)[-1]
    root = self.root
    evaluate = lambda *more: run(f"--init={path}", "--eval_only", f"--workdir={root}", f"--data_dir={root}", *more)
    said = evaluate(f"--dataset={self.data}", "--eval=validation,train,v2", "--batch_size=8", "--dtype=float32")
    self.assertEqual(line(said), line(log))
    self.assertRegex(said, "v2 +not available: .*imagenet_v2.*input_pipeline.py(.|\n)*train +top-1.* 40 images")
    with open(f"{root}/eval.json") as f:
      self.assertEqual({(x["split"], x["step"], x["weights"]) for x in json.load(f).values()},
                       {("validation", 120, path), ("train", 120, path)})
    # Without --dataset and --dtype they are the checkpoint's; 3 rows are no multiple of the devices.
    self.assertEqual(line(evaluate("--eval=validation", "--batch_size=3", "--grad_accum=7")), line(log))
    # The same pictures, the same names of classes in another order.
    paths = tf.io.gfile.glob(f"{self.data}validation/*/*")
    pictures = tf.data.Dataset.from_tensor_slices((paths, [COLORS.index(name.split("/")[-2]) for name in paths]))
    tfds.dataset_builders.store_as_tfds_dataset(
        "colors", "1.0.0", data_dir=root, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="png"), "label": tfds.features.ClassLabel(names=COLORS)}),
        split_datasets={"validation": pictures.map(lambda name, label: {
            "image": tf.io.decode_png(tf.io.read_file(name), 3), "label": label})})
    self.assertEqual(line(evaluate("--eval=validation", "--batch_size=8", "--dataset=colors")), line(log))
    tuned = run(*self.flags("--dataset=colors", f"--init={path}", f"--data_dir={root}", "--train_split=validation",
                            "--epochs=12.4", "--mixup=0", "--randaug_layers=0"))
    self.assertNotIn("new head", tuned)
    self.assertLess(float(losses(tuned)["1"]), 0.3)  # the labels follow the weights
    self.assertEqual(self.arrays()["label_names"].tolist(), ["blue", "green", "red"])

  def test_predict(self):
    root, flag = self.root, (f"--init={self.trained()[1]}", f"--workdir={self.root}/out")
    red, blue = f"{self.data}validation/red/0.png", f"{self.data}validation/blue/2.png"
    with patch(augment, "draw_grid", wraps=augment.draw_grid) as draw_grid:
      self.assertRegex(run(*flag, f"--predict={red},{blue}"), f"{red}: red .*%.*\n{blue}: blue .*%")
    out, drawn, captions = map(np.asarray, draw_grid.call_args.args[:3])
    self.assertTrue(os.path.exists(str(out)))
    plain, dimmed = drawn[::2], drawn[1::2]  # beside each the same, dark where nobody looks
    self.assertTrue((dimmed <= plain).all() and (dimmed >= 0.2 * plain.astype(float) - 1).all())
    self.assertRegex(captions[0] + captions[2], "0.png: red .*%.*2.png: blue .*%")
    files = {"0.jpeg": picture(color="red"), "1.PNG": picture(kind="PNG", color="lime"), "2.txt": b"no picture",
             "3.gif": picture(kind="GIF", color="blue"), "cut/1.jpg": picture((400, 400))[:300], "bad/2.txt": b""}
    odd, mine = write_folder(f"{root}/mine[1]*", files), write_folder(f"{root}/mine1", files)
    best = {"0.jpeg": "red", "1.PNG": "green", "3.gif": "blue"}
    for given, expected in (([mine + "3.gif", odd + "0.jpeg"], [mine + "3.gif", odd + "0.jpeg"]),
                            ([odd], [odd + name for name in best]),
                            ([mine + "[13].*", odd + "1.PNG"], [mine + "1.PNG", mine + "3.gif", odd + "1.PNG"])):
      said = re.findall(r"^(\S+): (\w+) \d+\.\d%, ", run(*flag, "--predict", *given), re.M)
      self.assertEqual(said, [(name, best[os.path.basename(name)]) for name in expected])
    for name in ("cut/1.jpg", "nothing.jpg", "bad", "bad/2.txt", "bad/*.jpg"):
      said = refused(*flag, f"--predict={red}", mine + name)
      self.assertRegex(said, rf"^--predict={re.escape(mine + name)}: .*picture")
    with mock.patch("PIL.Image.MAX_IMAGE_PIXELS", 9):  # for Pillow, a bomb
      self.assertRegex(refused(*flag, f"--predict={red}"), f"^--predict={red}: .*picture")
    init = f"--init={weights_file(root, change={'head/kernel': np.zeros((32, 3))})}"
    self.assertRegex(run(init, "--image_size=16", f"--predict={red}", flag[1]), "head.* all zeros, that is, untrained")

  def test_a_phones_picture_is_turned(self):
    from PIL import Image
    pixels, exif = default_rng(0).integers(0, 256, (60, 90, 1), np.uint8).repeat(3, 2), Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    Image.fromarray(pixels).save(f"{self.root}/a.jpg")
    Image.fromarray(pixels).save(f"{self.root}/b.jpg", exif=exif)
    Image.open(f"{self.root}/a.jpg").rotate(-90, expand=True).save(f"{self.root}/c.png")
    path = weights_file(self.root)
    said = run(f"--init={path}", "--image_size=16", f"--predict={self.root}", f"--workdir={self.root}/out")
    stored, phone, upright = re.findall(r"^\S+\.\w{3}: (.*%)", said, re.M)
    self.assertEqual(phone, upright)
    self.assertNotEqual(phone, stored)

  @cases(("sincos2d", []), ("sincos2d", ["red", "ship"]), ("learned", ["blue", "green", "red"]))
  def test_fine_tune_at_another_size_on_other_classes(self, posemb, known):
    of = TINY._replace(posemb=posemb, num_classes=len(known))
    headless = {} if known else {"head/kernel": None, "head/bias": None}
    data = write_folder(f"{self.root}/two", {
        f"{split}/{name}/{i}.png": picture(kind="PNG", color=name)
        for i in range(8) for split in ("train", "validation") for name in ("red", "white")})
    init = f"--init={weights_file(self.root, of, headless, label_names=np.array(known))}"
    flag = self.flags(init, f"--dataset={data}", "--epochs=5")
    log = run(*flag, "--image_size=24")
    self.assertRegex(log, f"new head: .*white.*{'|'.join(known[1:2])}(.|\n)*validation +top-1")
    self.assertAlmostEqual(float(losses(log)["1"]), math.log(2), places=3)
    before, after = model.flatten(random_params(config=of)), self.arrays()
    self.assertEqual(after["label_names"].tolist(), ["red", "white"])
    close(before["embedding/kernel"], after["params/embedding/kernel"], atol=0.05)
    if posemb == "learned":  # of 2 x 2 patches, the middle of 3 x 3 is the mean
      middle = after["params/pos_embedding"].reshape(9, 32)[4]
      close(middle, before["pos_embedding"].mean((0, 1)), atol=0.05)
    elif known:
      said = run(*flag, "--eval_only")
      self.assertRegex(said, "validation +not available.*white.*ship.*\n\nexit: Error: --eval=validation")
      for about in ({}, {"label_names": np.array(["0", "1"])}):  # what has no names counts by its order
        weights_file(self.root, of, **about)
        self.assertRegex(run(*flag, "--eval_only"), "validation +top-1.* 16 images")

  def test_a_checkpoint_of_c3ea7f2(self):
    then = dict(
        epochs=4.0, batch_size=8, dataset=self.data, train_split="train", variant="mu/8", image_size=16,
        posemb="sincos2d", pool="gap", head="mlp", randaug_layers=2, randaug_magnitude=10.0, mixup=0.2, lr=0.1,
        weight_decay=1e-4, warmup_steps=2, grad_clip_norm=1.0, dtype="float32", seed=0, init=None, grad_accum=2)
    arrays = {"opt_state/1/count": np.int32(15), "opt_state/4/count": np.int32(15), "step": np.int32(15),
              "label_names": np.array(["blue", "green", "red"]), "flags": np.array(json.dumps(then))}
    for name, shape in shapes_of(TINY).items():  # ModelTest has the names
      wave = np.sin(np.arange(math.prod(shape)) + len(name)).reshape(shape).astype(np.float32)
      arrays |= {f"params/{name}": wave / 5, f"opt_state/1/nu/{name}": wave ** 2 / 100,
                 f"opt_state/1/mu/{name}": (wave / 10).astype(jnp.bfloat16).view("V2")}
    os.makedirs(self.workdir)
    np.savez(f"{self.workdir}/checkpoint_00000015.npz", **arrays)
    params, info = model.load(last_path(self.workdir))
    self.assertEqual(info, (TINY, ("blue", "green", "red"), then, 15))
    for name, x in model.flatten(params).items():
      same(x, arrays[f"params/{name}"])
    log = run(*self.flags("--lr=0.1"))
    self.assertRegex(log, "Resuming after step 15(.|\n)*step 16/20")
    # As c3ea7f2 went on from this file, on one device.
    found = [*losses(log).values(), re.search("validation .* loss (\\S+)", log)[1]]
    close(np.float64(found), [1.1158, 1.1140, 1.0712, 1.1126, 1.1003, 1.1039], atol=2e-4)

  def test_a_stop_is_read_together_with_the_step_after_it(self):
    step = train.RunLog(self.workdir, 9, 8, 40).step
    metrics = lambda stop, loss: dict(stop=np.int32(stop), bad=np.int32(0), loss=np.float32(loss),
                                      learning_rate=np.float32(0), grad_norm=np.float32(0))
    with printed():
      self.assertEqual([step(1, metrics(0, 1), False), step(2, metrics(15, 1), False)], [0, 0])
      self.assertRaisesRegex(train.UserError, "not finite at step 3", step, 3, metrics(0, np.nan), False)

  def test_a_signal_during_an_evaluation_and_the_log_after_it(self):
    batches = input_pipeline.eval_batches
    def interrupted(*args, **kwargs):
      for batch in batches(*args, **kwargs):
        train.received_signal = 15
        yield batch
    with patch(input_pipeline, "eval_batches", interrupted):
      log = run(*self.flags("--eval_every=7"))
    self.assertIn("Stopped after step 7; the same command goes on from the last checkpoint.\n\nexit: 143", log)
    self.assertEqual(self.steps(), [5, 7])
    self.assertFalse(os.path.exists(f"{self.workdir}/eval.json"))
    with open(f"{self.workdir}/log.jsonl", "a") as f:
      f.write('{"step": 8, "lo')  # as a full disk or a power cut leaves it
    again = run(*self.flags("--eval_every=7"))
    self.assertEqual(re.findall("Resuming after step (.*) from|Evaluation at step (.*):", again),
                     [("7", ""), ("", "7"), ("", "14"), ("", "20")])
    steps = [[line["step"] for line in lines] for lines in self.read_log(self.workdir)]
    self.assertEqual(steps, [[*range(1, 21)], [7, 14, 20]])

  def test_what_cannot_be_written_does_not_end_a_run(self):
    full, write = "No space left on device", train.write_npz
    def write_npz(path, arrays):
      if re.search("00[12]0.npz", path):
        raise OSError(28, full)
      write(path, arrays)
    os.makedirs(f"{self.workdir}/eval.json")
    with patch(train, "write_npz", write_npz), \
        patch(tf.summary, "scalar", side_effect=tf.errors.ResourceExhaustedError(None, None, full)):
      log = run(*self.flags("--keep_every=8"))
    for part in (f"run.* could not be written .{full}.; the run goes on", "eval.json could not be written",
                 f"{full}.; the previous one is kept, and the run goes on(.|\n)*step 20/20 (.|\n)*validation +top-1",
                 f"\nexit: Error: .*{full}.; the previous one is kept$"):  # the last one is an error
      self.assertRegex(log, part)
    self.assertEqual(self.steps(), [8, 15, 16])
    run(*self.flags("--keep_every=8"))
    self.assertEqual(self.steps(), [8, 16, 20])

  BENCHMARK = "--benchmark", "--variant=mu/8", "--image_size=16", "--dtype=float32", "--head=linear", "--batch_size=32"

  def test_benchmark(self):
    with patch(jax, "devices", lambda d=jax.devices(): d[:1]), patch(jax, "device_count", lambda: 1), \
        patch(train, "benchmark", functools.partial(train.benchmark, rounds=1)):
      self.assertRegex(run(*self.BENCHMARK, "--batch_size=6"),
                       r"Compiled in \S+ s(.|\n)*\nmu/8 at 16, float32, batch 6 on 1 x cpu: \S+ images/s, "
                       r"\S+ GFLOP/s, \d\.\d\d of .* matrix product.* \S+ GiB a device")

  @cases(
      ("", 1, [1], r"\nmu/8 at 16, float32, batch 32 on 4 x v3: 0\.\d\d of 16 GiB a device, 2.5 GB moved .* 125 ms\n$"),
      ("--topology=v4:2x2x1", 1, [1], r"4 x v4: 0\.\d\d of 32 GiB a device, 2.5 GB moved a step\n$"),
      ("", 4, [1, 2, 4], "\nexit: Error: .*--batch_size=32.*--grad_accum=4.*$"),
      ("--grad_accum=2 --batch_size=16", 99, [2, 4], "\nexit: Error: --batch_size=16 .*large"),  # 8 are too many
      ("--batch_size=30", 1, [1], "\nexit: Error: --batch_size=30: expected a multiple of 4 devices.*$"),
      ("--topology=h100:2x2", 1, [], "^\nexit: Error: --topology=h100:2x2: .*v3:2x2.*$"),
      ("", 0, [], r"^\nexit: Error: --topology=v3:2x2: TPU support not.*pip install .jax\[tpu\].*$"))
  def test_topology(self, flag, fits, expected, message):
    """On four simulated devices, which are too small for fewer than `fits` parts."""
    compile_step, tried = train.compile_step, []
    def limited(config, batch_size, *args):
      tried.append(parts := args[-1]["grad_accum"])
      if parts < fits and batch_size % (parts * 4) == 0:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out\nof hbm")
      # A CPU's compiler has no estimate.
      stand_in = types.SimpleNamespace(cost_analysis=lambda: {"bytes accessed": 2.5e9, "optimal_seconds": 0.125})
      return [stand_in if hasattr(x, "cost_analysis") else x for x in compile_step(config, batch_size, *args)]
    with mock.patch("jax.experimental.topologies.get_topology_desc") as described, \
        patch(train, "compile_step", limited):
      described.return_value.devices = jax.devices()[:4]
      described.side_effect = RuntimeError("TPU support not installed\n") if fits == 0 else None
      said = run(*self.BENCHMARK[1:], "--topology=v3:2x2", *flag.split())
    self.assertRegex(said, message)
    self.assertEqual(tried, expected)
    self.assertEqual([int(n) for n in re.findall("^Compiling .*--grad_accum=(.)", said, re.M)], expected)
    self.assertEqual(described.call_args.kwargs.get("chip_config_name") == "megacore", "v4" in flag)

  def test_processes_are_joined_only_where_there_are_some(self):
    alone = dict(SLURM_JOB_ID="1", SLURM_NTASKS="1", SLURM_STEP_NODELIST="a", TPU_WORKER_HOSTNAMES="localhost")
    for env, calls in ((alone, 0), (dict(SLURM_JOB_ID="1", SLURM_NTASKS="4"), 0),
                               (alone | {"SLURM_NTASKS": "2"}, 1), (dict(TPU_WORKER_HOSTNAMES="a,b"), 1)):
      with patch(jax.distributed, "initialize") as initialize, mock.patch.dict(os.environ, env):
        train.start_processes(None, None, None)
      self.assertEqual(initialize.call_count, calls, env)

  def test_bad_images_in_a_run(self):
    data = noise_folder(self.root)
    write_folder(data, {f"{split}/red/broken.png": b"text" for split in ("train", "validation", "rotten")})
    flag = self.flags(f"--dataset={data}", "--pool=cls", "--head=linear", "--posemb=learned", "--randaug_layers=0",
                      "--mixup=0", "--grad_clip_norm=0", "--warmup_steps=0")  # the report's "Original" in passing
    self.assertRegex(refused(*flag), "bad record .*train/red/broken.png.*--skip_bad_images")
    flag.append("--skip_bad_images")
    log = run(*flag)  # 41 records, 8 at a time, 4 epochs
    self.assertRegex(log, "step 20/20  epoch 3.90.*4 bad images left out(.|\n)*13 images  .1 bad images left out.")
    init, out = f"--init={last_path(self.workdir)}", f"--workdir={self.root}/out"
    self.assertEqual(model.load(init[7:])[1].config, TINY._replace(pool="cls", head="linear", posemb="learned"))
    self.assertIn("rotten", refused(*flag, "--eval_only", "--eval=rotten", init, out))  # not 0 %
    self.assertFalse(os.path.exists(f"{self.root}/out/eval.json"))
    self.assertIn("no record of a batch can be used", refused(*flag, "--train_split=rotten", "--epochs=64", out))

  def test_a_loss_that_is_not_finite(self):
    said = refused(*self.flags("--lr=1e6", "--grad_clip_norm=0", "--weight_decay=1e8", "--epochs=20",
                               "--warmup_steps=9", "--checkpoint_every=1"))
    step = re.search(r"not finite at step (\d+): .*loss.*--lr", said)[1]
    self.assertLess(self.steps()[-1], int(step))
    for name, x in model.flatten(model.load(last_path(self.workdir))[0]).items():
      self.assertTrue(np.isfinite(x).all(), name)

  @cases(
      ("--image_size=20", "=20: expected a multiple"),
      ("--warmup_steps=20", "=20 is not shorter than the run of 20 steps: pass --warmup_steps=2"),
      ("--batch_size=12", "=12: expected a multiple of 8 devices"), ("--grad_accum=3", "8 devices times .*=3"),
      ("--benchmark --batch_size=4", "=4: expected a multiple of 8 devices"),
      ("--dataset=imagenet2012", "imagenet2012 is not prepared in .*--manual_dir.*patterns.*ILSVRC2012_img_train.tar"),
      ("--dataset=nothing", "no such data set"), ("--eval=test", "none of these is available.*train, validation"),
      ("--train_split=test", "split 'test' of .* it has train .40., validation .13."),
      ("--epochs=0", "--epochs.* is less than one step of --batch_size=8"), ("--eval_only", "need .*--init"),
      ("--workdir=/dev/null/x", "--workdir=/dev/null/x cannot be written"), ("stray.jpg", "stray.jpg.*expected"),
      ("--init=/nowhere.npz", "/nowhere.npz is not a checkpoint that can be read"),
      ("--coordinator=localhost:1", "--coordinator needs --num_processes and --process_id"),
      ("--benchmark epochs=90", "epochs=90.*expected"))
  def test_bad_input_is_one_line(self, flag, message):
    self.assertRegex(refused(*self.flags(f"--data_dir={self.root}", *flag.split())), message)
    self.assertEqual(self.steps(), [])

  @cases("--lr=-1", "--weight_decay=inf", "--posemb=none", "--mixup=nan", "--batch_size=0", "--randaug_magnitude=nan")
  def test_flags_out_of_range(self, flag):
    with flagsaver.flagsaver(), self.assertRaisesRegex(flags.IllegalFlagValueError, flag.split("=")[0][2:]):
      flags.FLAGS(["train.py", flag])

  def test_changed_flags_are_refused(self):
    again = lambda *more: run(*self.flags(*more))
    again()
    fewer = again("--epochs=2", "--allow_changes")  # the run is longer than that already
    self.assertEqual((losses(fewer), re.findall("Evaluation at step (.*):", fewer)), ({}, ["20"]))
    self.assertRegex(again("--mixup=0.5", "--seed=1"), r"exit: .*--mixup=0.2 \(now 0.5\), --seed=0 \(now 1\)")
    with patch(input_pipeline, "ORDER", 2):
      self.assertRegex(again(), r"exit: .*data_order=1 \(now 2\)")
    # A flag of a fork belongs to the recipe; what its default does was done before there was the flag.
    flags.DEFINE_integer("rotary", 0, "A fork's.", module_name="train")
    try:
      self.assertRegex(again("--rotary=1"), r"exit: .*--rotary=0 \(now 1\)")
      self.assertRegex(again(), "Resuming after step 20(.|\n)*validation +top-1")
      again(f"--workdir={self.root}/fork", "--rotary=1")
    finally:
      delattr(flags.FLAGS, "rotary")
    self.assertRegex(again(f"--workdir={self.root}/fork"), r"exit: .*--rotary=1 \(now unknown\)")

  # Runs that are killed need processes of their own.

  def start(self, *more, devices=1, stderr=subprocess.DEVNULL):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen([sys.executable, "-u", f"{HERE}/train.py", *self.flags(*more)], env=env, stderr=stderr,
                            stdout=subprocess.PIPE, text=True)

  def read(self, process, log, until=None):
    """Adds to a log what a process prints, up to some line, or until it ends, soon after its last one."""
    last = time.time()
    for line in process.stdout:
      log.append(line)
      last = time.time()
      if until and re.search(until, line):
        return
    process.wait(60)
    self.assertLess(time.time() - last, 20, log[-1:])
    self.assertIsNone(until, "".join(log))

  def test_killed_at_random_the_run_is_the_same(self):
    rng, log, reached = default_rng(int(time.time())), [], 0
    start = lambda *more: self.start("--epochs=40", "--checkpoint_every=1", *more)  # it is nearly always writing one
    self.read(start(f"--workdir={self.root}/whole"), log)
    whole = losses("".join(log))
    self.assertLen(whole, 200)
    for kill in [signal.SIGKILL] * 5 + [signal.SIGTERM, signal.SIGINT, 0]:
      process, log = start(), []
      if kill:
        self.read(process, log, f"^step {reached + rng.integers(1, 8)}/")
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(kill)
      self.read(process, log)
      log = "".join(log)
      self.assertLessEqual(losses(log).items(), whole.items())
      if process.returncode or "step 200/200" not in log:  # else too fast for us
        self.assertEqual(process.returncode, -9 if kill == 9 else kill and 128 + kill, log)
      if process.returncode > 0:
        self.assertRegex(log, "saving a checkpoint and stopping(.|\n)*Stopped after step .*the same command goes")
      reached = ([0] + self.steps())[-1]
    self.assertIn("Resuming after step", log)
    expected = model.read_npz(last_path(f"{self.root}/whole"))
    for name, x in self.arrays().items():
      same(x, expected[name], name)

  def pair(self, *more, devices=4):
    """Two processes of one run."""
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      more += f"--coordinator=127.0.0.1:{s.getsockname()[1]}", "--num_processes=2", "--batch_size=16"
    return [self.start(*more, f"--process_id={i}", devices=devices, stderr=subprocess.STDOUT) for i in range(2)]

  def test_two_processes(self):
    lost, log = self.pair(f"--workdir={self.root}/lost", "--epochs=4000", "--randaug_layers=0", devices=1), []
    self.read(lost[0], log, "^step 7/")
    lost[1].kill()
    rest = train.futures.ThreadPoolExecutor().submit(lost[0].communicate, timeout=60)  # it takes half a minute

    pair = self.pair()
    log, second = (process.communicate()[0] for process in pair)
    self.assertEqual([process.returncode for process in pair], [0, 0], log[-3000:] + second[-3000:])
    self.assertNotIn("step 1/", second)
    one = run(*self.flags("--batch_size=16", f"--workdir={self.root}/one"))  # eight devices in this process
    for step, loss in losses(one).items():
      self.assertAlmostEqual(float(losses(log)[step]), float(loss), delta=2e-4)
    self.assertEqual(re.search("validation .*", log)[0], re.search("validation .*", one)[0])  # 13 images, once each

    self.assertRegex(rest.result()[0], "another process of this run was lost|another task died")
    self.assertNotEqual(lost[0].returncode, 0)
    self.assertGreaterEqual(train.checkpoints(f"{self.root}/lost")[-1][0], 5)
    lost[1].communicate()


class ReadmeTest(absltest.TestCase):

  README = tf.io.gfile.GFile(f"{HERE}/README.md").read()

  def test_commands_parse(self):
    lines = self.README.replace("\\\n", " ")
    commands = re.findall(r"(?:^(?:.*&& )?|`)(python \w+\.py[^|`\n]*)", lines, re.M)
    self.assertGreater(len(commands), 20)
    for command in commands:
      _, script, *arguments = shlex.split(command.split("#")[0].replace("[", "").replace("]", ""))
      self.assertTrue(os.path.exists(f"{HERE}/{script}"), command)
      if script == "train.py":
        with flagsaver.flagsaver():
          _, *stray = flags.FLAGS([script, *arguments])
          self.assertTrue(flags.FLAGS.predict or not stray, command)

  def test_from_python(self):
    """The README's own lines, after a demo of fewer pictures."""
    block = re.search("^## From Python\n.*?^```python\n(.*?)^```", self.README, re.M | re.S)[1]
    config = model.Config("demo/12", 48, num_classes=10, dtype="float32")
    about = dict(config=np.array(json.dumps(config._asdict())), label_names=np.array(list(input_pipeline.PATTERNS)))
    patterns, root = input_pipeline.Patterns, self.create_tempdir().full_path
    few = lambda self, _: {"train": self._generate_examples(0, 80), "validation": self._generate_examples(1, 20)}
    os.makedirs(f"{root}/demo")
    os.rename(weights_file(root, config, **about), f"{root}/{re.search('demo/checkpoint_[0-9]+.npz', block)[0]}")
    with printed() as out, contextlib.chdir(root), patch(patterns, "_split_generators", few), \
        patch(input_pipeline, "Patterns", lambda data_dir: patterns(data_dir=root)):
      exec(compile(block, "README.md", "exec"), {})
    self.assertRegex(out.getvalue(), "(.|\n)*".join(("|".join(input_pipeline.PATTERNS), "loss", "top1")))


if __name__ == "__main__":
  absltest.main()
