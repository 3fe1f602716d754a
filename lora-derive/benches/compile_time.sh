#!/bin/sh
# How long the compiler takes for a Llama-like model with `LoraTargets` derived and ten checked
# patterns, against the same file with `serde::Serialize` derived.
#
#     lora-derive/benches/compile_time.sh [rounds]
#
# Checks two generated crates in turn (`cargo check` after a touch; the dependencies are built
# before), so that a busy machine slows both alike, and prints the medians and their ratio.
set -eu

rounds=${1:-15}
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${CARGO_TARGET_DIR:-$root/target}/compile-time
mkdir -p "$work"

# crate NAME DERIVE IMPORTS LINEAR: the model, with a layer type for each kind of field.
crate() {
    mkdir -p "$work/$1/src"
    cp "$root/Cargo.lock" "$work/$1/Cargo.lock"
    cat >"$work/$1/Cargo.toml" <<TOML
[package]
name = "$1"
version = "0.0.0"
edition = "2024"

[dependencies]
lora-core = { path = "$root/lora-core" }
serde = { version = "1", features = ["derive"] }

[workspace]
TOML
    cat >"$work/$1/src/lib.rs" <<RUST
#![allow(dead_code)]
$3

#[derive($2)]
pub struct Attention {
    q_proj: $4, k_proj: $4, v_proj: $4, o_proj: $4,
    num_heads: usize, num_kv_heads: usize, head_dim: usize, scale: f64,
}
#[derive($2)]
pub struct Mlp { gate_proj: $4, up_proj: $4, down_proj: $4, act: Option<bool> }
#[derive($2)]
pub enum FeedForward { Dense(Mlp), Experts { router: $4, experts: Vec<Mlp>, shared: Option<Mlp> } }
#[derive($2)]
pub struct Block { input_norm: Norm, self_attn: Attention, post_norm: Norm, mlp: FeedForward }
#[derive($2)]
pub struct Norm { eps: f64, offset: Option<f64> }
#[derive($2)]
pub struct Model { embed_tokens: Vec<f32>, layers: Vec<Block>, norm: Norm }
#[derive($2)]
pub struct Llama { model: Model, lm_head: $4, tied: bool, name: String }
RUST
}

crate with_serialize serde::Serialize \
    '#[derive(serde::Serialize)] pub struct Linear { weight: Vec<f32>, bias: Option<Vec<f32>> }' Linear
crate with_lora_targets lora_core::LoraTargets '' lora_core::nn::Linear
cat >>"$work/with_lora_targets/src/lib.rs" <<'RUST'
pub const NAMES: [&str; 10] = lora_core::targets!(Llama: [
    "*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*.gate_proj", "up_proj", "*.down_proj",
    "model.layers.0.*.experts.7.down_proj", "model.layers.11.self_attn.*", "lm_head",
]);
RUST

check() {
    CARGO_TARGET_DIR="$work/target" cargo check --quiet --manifest-path "$work/$1/Cargo.toml"
}

# Milliseconds of one check after a touch.
timed() {
    touch "$work/$1/src/lib.rs"
    start=$(date +%s%N)
    check "$1"
    echo $((($(date +%s%N) - start) / 1000000))
}

check with_serialize
check with_lora_targets
: >"$work/serialize.ms"
: >"$work/lora_targets.ms"
round=0
while [ "$round" -lt "$rounds" ]; do
    timed with_serialize >>"$work/serialize.ms"
    timed with_lora_targets >>"$work/lora_targets.ms"
    round=$((round + 1))
done

median() { sort -n "$1" | sed -n "$((rounds / 2 + 1))p"; }
serialize=$(median "$work/serialize.ms")
lora_targets=$(median "$work/lora_targets.ms")
echo "serde::Serialize:              $serialize ms"
echo "LoraTargets and ten patterns:  $lora_targets ms"
awk "BEGIN { printf \"ratio:                         %.2f\n\", $lora_targets / $serialize }"
