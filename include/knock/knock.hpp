#pragma once
// Everything but the trainer side (knock/train.hpp), in the order of the floors.

#include <knock/config.hpp>
#include <knock/fwd.hpp>

#include <knock/core/backend.hpp>
#include <knock/core/device.hpp>
#include <knock/core/dtype.hpp>
#include <knock/core/error.hpp>
#include <knock/core/graph.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/philox.hpp>
#include <knock/core/print.hpp>
#include <knock/core/products.hpp>
#include <knock/core/rounded.hpp>
#include <knock/core/shape.hpp>
#include <knock/core/state_dict.hpp>
#include <knock/core/storage.hpp>
#include <knock/core/tensor.hpp>
#include <knock/core/trace.hpp>

#include <knock/autograd/checkpoint.hpp>
#include <knock/autograd/engine.hpp>
#include <knock/autograd/function.hpp>
#include <knock/autograd/grad_mode.hpp>
#include <knock/autograd/gradcheck.hpp>
#include <knock/autograd/node.hpp>
#include <knock/autograd/twin.hpp>
#include <knock/autograd/view.hpp>

#include <knock/ops/attention.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/dropout.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/inplace.hpp>
#include <knock/ops/knock_norm_rope.hpp>
#include <knock/ops/loss.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/mlp.hpp>
#include <knock/ops/mlp_knock.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/norm_rope.hpp>
#include <knock/ops/optim.hpp>
#include <knock/ops/paged_attention.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/random.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/rope.hpp>
#include <knock/ops/scan.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/sort.hpp>
#include <knock/ops/view.hpp>

#include <knock/nn/attention/attention.hpp>
#include <knock/nn/attention/cost.hpp>
#include <knock/nn/attention/gla2.hpp>
#include <knock/nn/attention/grouped.hpp>
#include <knock/nn/attention/gta.hpp>
#include <knock/nn/attention/hydra.hpp>
#include <knock/nn/attention/knock.hpp>
#include <knock/nn/attention/make_attention.hpp>
#include <knock/nn/attention/mla.hpp>
#include <knock/nn/attention/moa.hpp>
#include <knock/nn/attention/options.hpp>
#include <knock/nn/attention/talking_heads.hpp>
#include <knock/nn/dropout.hpp>
#include <knock/nn/embedding.hpp>
#include <knock/nn/init.hpp>
#include <knock/nn/linear.hpp>
#include <knock/nn/mlp.hpp>
#include <knock/nn/module.hpp>
#include <knock/nn/moe/balance.hpp>
#include <knock/nn/moe/moe.hpp>
#include <knock/nn/moe/router.hpp>
#include <knock/nn/norm.hpp>
#include <knock/nn/paged_cache.hpp>
#include <knock/nn/sequential.hpp>

#include <knock/optim/adamw.hpp>
#include <knock/optim/clip.hpp>
#include <knock/optim/optimizer.hpp>
#include <knock/optim/schedule.hpp>
#include <knock/optim/sgd.hpp>

#include <knock/io/safetensors.hpp>
#include <knock/io/trace.hpp>

#include <knock/models/moe_lm.hpp>

#include <knock/cpu/backend.hpp>
