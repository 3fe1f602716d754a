// Runs shrink_ring.cu on a CPU; see emulator.rs.
//
// Arguments: rows, columns, ranks, whether x is early, the scale, and step, seed, site, threshold and scale of the mask.
// Standard input: x and `a`, with padded rows, bf16. Standard output: S, bf16.
#include "../cuda/types.cuh"

#include "machine.hpp"

#include "../cuda/tile.cuh"

#include "hopper.hpp"

#include "../cuda/bits.cuh"

#include "launch.hpp"

#include "../cuda/shrink_ring.cu"

static TensorMap x_map, a_map;
static int rows, cols, ranks, early;
static Scales scales;
static Dropout dropout;
static std::vector<T> s;

static void run() { shrink_ring(x_map, a_map, s.data(), rows, cols, ranks, early, scales, dropout); }

int main(int count, char** arguments) {
  Arguments number(count, arguments);
  rows = number(), cols = number(), ranks = number(), early = number();
  std::fill(scales.of, scales.of + 64, (float)number());
  dropout = number.dropout();
  int lda = (cols + 63) / 64 * 64;
  auto x = read<T>((size_t)rows * cols), a = read<T>((size_t)ranks * lda);
  s.assign((size_t)rows * ranks, 0xffff);
  x_map = {x.data(), rows, cols, cols, ROWS}, a_map = {a.data(), ranks, lda, lda, RT};
  launch(run, {(u32)((rows + ROWS - 1) / ROWS), (u32)(ranks / RT)}, THREADS, 1);
  write(s);
  return 0;
}
