// Runs decode.cu on a CPU; see emulator.rs.
//
// Arguments: tokens, columns, rows, rank, scale and stages. Standard input: x, W and the bias, bf16, then A and B, of the
// adapter's type. Standard output: S and y, bf16.
#include "../cuda/types.cuh"

#include "machine.hpp"

#include "../cuda/tile.cuh"

#include "hopper.hpp"

#include "wgmma.hpp"
#include "launch.hpp"

#include "../cuda/decode.cu"

static TensorMap x_map, w_map, a_map;
static int tokens, rows, cols, rank, stages;
static float scale;
static std::vector<T> bias, y, s;
static std::vector<Adapter> b;

static void run() { decode(x_map, w_map, a_map, bias.data(), b.data(), y.data(), s.data(), tokens, rows, cols, rank, scale, stages); }

int main(int count, char** arguments) {
  Arguments number(count, arguments);
  tokens = number(), cols = number(), rows = number(), rank = number(), scale = number(), stages = number();
  auto x = read<T>((size_t)tokens * cols), w = read<T>((size_t)rows * cols);
  bias = read<T>(rows);
  auto a = read<Adapter>((size_t)rank * cols);
  b = read<Adapter>((size_t)rows * rank);
  s.assign((size_t)tokens * RT, 0xffff), y.assign((size_t)tokens * rows, 0xffff);
  x_map = {x.data(), tokens, cols, cols, TOKENS}, w_map = {w.data(), rows, cols, cols, ROWS};
  a_map = {a.data(), rank, cols, cols, RT, sizeof(Adapter)};
  launch(run, {(u32)(CLUSTER * ((rows + ROWS - 1) / ROWS)), 1}, THREADS, CLUSTER);
  write(s), write(y);
  return 0;
}
