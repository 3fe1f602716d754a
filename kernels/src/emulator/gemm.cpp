// Runs gemm.cu on a CPU; see emulator.rs.
//
// Arguments: the numbers that the launcher gives the kernel. Standard input, all bf16: the input, W, p, with DOWN what makes q
// and without it q, and the bias; with SIDE q and z of the first and z of the second side product, and without DOWN
// SPLITS parts of other sums. Standard output: q and the output, and the gradients and those sums in f32.
#include "../cuda/types.cuh"

#include "machine.hpp"

#include "../cuda/tile.cuh"

#include "hopper.hpp"

#include "../cuda/bits.cuh"

#include "wgmma.hpp"
#include "bits.hpp"
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

#include "../cuda/sum.cuh"
#include "../cuda/side.cuh"
#include "../cuda/gemm.cu"

constexpr int Q_COLS = 16 * RANK_STEPS, SPLITS = 5, SUM_COLS = 36;

static TensorMap input_map, weight_map, q_map, p_map, out_map, down_map, side_maps[2];
static int rows, cols, depth, busy;
static Dropout dropout;
static Flags flags;
static Down down;
static Tail tail;
static Side side;
static std::vector<T> bias;
static std::vector<u32> kept;

static void run() {
  gemm(input_map, weight_map, q_map, p_map, out_map, down_map, side_maps[0], side_maps[1], bias.data(), rows, cols, depth, Q_COLS, busy, dropout, kept.data(), flags, down, side, tail);
}

// A gradient of `rank` ranks of which a launch makes `whole` of the columns, and the others in segments.
struct Gradient {
  Sum sum;
  int whole;
  std::vector<float> values, parts;

  Gradient(int rank, int cols, int whole, int segments, bool transpose, bool accumulate) : whole(whole), values((size_t)rank * cols, accumulate ? 1.f : NAN), parts((size_t)segments * Q_COLS * cols, NAN) {
    sum = {parts.data(), values.data(), (i64)Q_COLS * cols, segments, rank, cols, 0, cols, transpose, 1, accumulate};
  }
  // As the launch after does.
  void add_up_rest() const {
    for (int row = 0; row < sum.rank; ++row)
      for (int col = whole; col < sum.cols; ++col) {
        float total = 0.f;
        for (int split = 0; split < sum.splits; ++split) total += sum.part[split * sum.stride + (i64)row * sum.cols + col];
        sum.put(row, col, total);
      }
  }
};

int main(int count, char** arguments) {
  Arguments number(count, arguments);
  rows = number(), depth = number(), cols = number(), busy = number();
  int clusters = number();
  down.shares = number(), down.window = number(), down.early = number(), down.delay = number(), down.at_once = number(), down.stride = number(), down.scale = number();
  tail.first = number(), tail.split = number();
  dropout = number.dropout();

  int down_cols = (depth + 7) / 8 * 8, p_cols = BACKWARD ? (cols + 7) / 8 * 8 : Q_COLS, p_rows = BACKWARD ? Q_COLS : cols;
  auto x = read<T>((size_t)rows * depth), w = read<T>((size_t)cols * depth), p = read<T>((size_t)p_rows * p_cols), a = read<T>(DOWN ? (size_t)Q_COLS * down_cols : 0);
  auto q = DOWN ? std::vector<T>((size_t)rows * Q_COLS, 0xffff) : read<T>((size_t)rows * Q_COLS);
  bias = read<T>(cols);
  std::vector<T> out((size_t)rows * cols, 0xffff);
  int cluster_rows = (rows + 255) / 256, tiles = cluster_rows * ((cols + 255) / 256), pieces = (tiles - tail.first) * tail.split;
  std::vector<u32> words(1 + 4 * cluster_rows + max(0, tiles - tail.first) * CLUSTER_WARPS);
  std::vector<float> partial((size_t)down.shares * cluster_rows * 256 * Q_COLS, NAN), sums((size_t)max(0, pieces) * CLUSTER * TILE_ROWS * TILE_COLS + 4, NAN);
  down.q = q.data(), down.partial = partial.data(), tail.sums = sums.data(), flags = {words.data(), cluster_rows};
  int box_rows = BACKWARD ? TILE_DEPTH : 128;
  input_map = {x.data(), rows, depth, depth, 128}, q_map = {q.data(), rows, Q_COLS, Q_COLS, 128};
  weight_map = BACKWARD ? TensorMap{w.data(), depth, cols, cols, box_rows} : TensorMap{w.data(), cols, depth, depth, box_rows};
  p_map = {p.data(), p_rows, BACKWARD ? cols : Q_COLS, p_cols, box_rows}, out_map = {out.data(), rows, cols, cols, 16}, down_map = {a.data(), Q_COLS, depth, down_cols, Q_COLS};

#if DROPOUT == 2
  kept = bits_of_matrix(dropout, rows, cols);
#endif
#if SIDE
  side.halved = number(), side.whole = number(), side.segment_rows = number(), side.all = number();
  int rank = number(), whole0 = number(), whole1 = number(), segments = (rows + side.segment_rows - 1) / side.segment_rows;
  auto q0 = read<T>((size_t)rows * Q_COLS), z1 = read<T>((size_t)rows * cols), given = read<T>(DOWN ? 0 : SPLITS * Q_COLS * SUM_COLS);
  Gradient first(rank, depth, whole0, segments, true, false), second(rank, cols, whole1, segments, false, true), before(rank, SUM_COLS, SUM_COLS, SPLITS, false, true);
  std::transform(given.begin(), given.end(), before.parts.begin(), to_float);
  std::vector<float> halves((size_t)side.halved * SIDE_CHUNK * Q_COLS, NAN);
  side.q0 = q0.data(), side.q1 = q.data(), side.ldq0 = side.ldq1 = Q_COLS, side.sum0 = first.sum, side.sum1 = second.sum, side.halves = halves.data();
  if (!DOWN) side.before[0] = before.sum;
  side_maps[0] = {x.data(), rows, depth, depth, BOX_ROWS}, side_maps[1] = {z1.data(), rows, cols, cols, BOX_ROWS};
#endif

  launch(run, {(u32)(CLUSTER * clusters), 1}, THREADS, CLUSTER);
  write(q), write(out);
#if SIDE
  first.add_up_rest(), second.add_up_rest();
  write(first.values), write(second.values), write(before.values);
#endif
  return 0;
}
