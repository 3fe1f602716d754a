// Runs gemm.cu, with q made by the launch, on a CPU; see emulator.rs.
//
// Arguments: the numbers that the launcher gives the kernel. Standard input: the input, W, p, down and the bias, all bf16.
// Standard output: q and the output.
#include "../cuda/types.cuh"

#include "machine.hpp"

#include "../cuda/tile.cuh"

#include "hopper.hpp"

#include "../cuda/bits.cuh"

#include "wgmma.hpp"
#include "launch.hpp"

#include "../cuda/gemm.cuh"
#include "../cuda/math.cuh"
#include "../cuda/walk.cuh"
#include "../cuda/output.cuh"
#include "../cuda/flags.cuh"
#include "../cuda/down.cuh"
#include "../cuda/making.cuh"
#include "../cuda/tail.cuh"
#include "../cuda/rank.cuh"

struct Side {};  // gradients are not made beside
#include "../cuda/gemm.cu"

static TensorMap input_map, weight_map, q_map, p_map, out_map, down_map;
static int rows, cols, depth, busy;
static Dropout dropout;
static Flags flags;
static Down down;
static Tail tail;
static std::vector<T> bias;
static std::vector<u32> kept;

static void run() {
  gemm(input_map, weight_map, q_map, p_map, out_map, down_map, input_map, input_map, bias.data(), rows, cols, depth, RANK, busy, dropout, kept.data(), flags, down, Side{}, tail);
}

int main(int count, char** arguments) {
  Arguments number(count, arguments);
  rows = number(), depth = number(), cols = number(), busy = number();
  down.shares = number(), down.window = number(), down.early = number(), down.delay = number(), down.at_once = number(), down.stride = number(), down.scale = number();
  tail.first = number(), tail.split = number();
  dropout.step = number(), dropout.seed = number(), dropout.site = number(), dropout.threshold = number(), dropout.scale = number();

  int down_cols = (depth + 7) / 8 * 8, p_cols = BACKWARD ? (cols + 7) / 8 * 8 : RANK, p_rows = BACKWARD ? RANK : cols;
  auto x = read<T>((size_t)rows * depth), w = read<T>((size_t)cols * depth), p = read<T>((size_t)p_rows * p_cols), a = read<T>((size_t)RANK * down_cols);
  bias = read<T>(cols);
  std::vector<T> q((size_t)rows * RANK, 0xffff), out((size_t)rows * cols, 0xffff);
  int cluster_rows = (rows + 255) / 256, tiles = cluster_rows * ((cols + 255) / 256), pieces = (tiles - tail.first) * tail.split;
  std::vector<u32> words(1 + 4 * cluster_rows + max(0, tiles - tail.first) * CLUSTER_WARPS);
  std::vector<float> partial((size_t)down.shares * cluster_rows * 256 * RANK, NAN), sums((size_t)max(0, pieces) * CLUSTER * TILE_ROWS * TILE_COLS + 4, NAN);
  down.q = q.data(), down.partial = partial.data(), tail.sums = sums.data(), flags = {words.data(), cluster_rows};
  int box_rows = BACKWARD ? TILE_DEPTH : 128;
  input_map = {x.data(), rows, depth, depth, 128}, q_map = {q.data(), rows, RANK, RANK, 128};
  weight_map = BACKWARD ? TensorMap{w.data(), depth, cols, cols, box_rows} : TensorMap{w.data(), cols, depth, depth, box_rows};
  p_map = {p.data(), p_rows, BACKWARD ? cols : RANK, p_cols, box_rows}, out_map = {out.data(), rows, cols, cols, 16}, down_map = {a.data(), RANK, depth, down_cols, RANK};

#if DROPOUT == 2
  kept.resize((size_t)(rows + 31) / 32 * ((cols + 127) / 128) * 32 * 4);
  for (int unit = 0; unit < (rows + 31) / 32 * ((cols + 127) / 128); ++unit)
    for (int lane = 0; lane < WARP; ++lane) store_bits(dropout, kept.data(), unit, rows, cols, lane);
#endif

  launch(run, {(u32)(CLUSTER * busy), 1}, THREADS, CLUSTER);
  write(q), write(out);
  return 0;
}
