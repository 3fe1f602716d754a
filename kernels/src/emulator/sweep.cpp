// Runs sweep.cu on a CPU; see emulator.rs.
//
// Arguments: the numbers that the launcher gives the kernel. Standard input, all bf16: z and q, with DOWN p, with NEXT the other
// matrix. Standard output: with DOWN s, in bf16, and the sums of every group of blocks, with NEXT those of the other matrix,
// in f32. Bits that are drawn are compared here.
#include "../cuda/types.cuh"

#include "machine.hpp"

#include "../cuda/tile.cuh"

#include "hopper.hpp"

#include "../cuda/bits.cuh"

#include "wgmma.hpp"
#include "bits.hpp"
#include "launch.hpp"

#include "../cuda/cluster_sum.cuh"
#include "../cuda/sweep.cu"

static TensorMap z_map, p_map, q_map, next_map, s_map;
static int rows, cols, block_rows, group;
static Scales scales;
static Dropout dropout;
static Bits bits;
static Next next;
static std::vector<T> s;
static std::vector<float> part;

static void run() { sweep(z_map, p_map, q_map, s.data(), part.data(), rows, cols, RT, block_rows, group, scales, dropout, bits, next_map, s_map, next); }

int main(int count, char** arguments) {
  Arguments number(count, arguments);
  rows = number(), cols = number(), block_rows = number(), group = number(), next.cols = number(), next.first_col = number();
  float scale = number();
  for (int i = 0; i < 64; ++i) scales.of[i] = scale * (i + 1);
  dropout = number.dropout();

  int p_cols = (cols + 7) / 8 * 8, blocks = (rows + block_rows - 1) / block_rows;
  auto z = read<T>((size_t)rows * cols), q = read<T>((size_t)rows * RT), p = read<T>(DOWN ? (size_t)RT * p_cols : 0), x = read<T>(NEXT ? (size_t)rows * next.cols : 0);
  s.assign(DOWN ? (size_t)rows * RT : 0, 0xffff);
  part.assign((size_t)blocks * RT * cols, NAN);
  std::vector<float> next_part(NEXT ? (size_t)blocks * RT * next.cols : 0, NAN);
  next.part = next_part.data();
  z_map = {z.data(), rows, cols, cols, LOAD_ROWS}, p_map = {p.data(), RT, p_cols, p_cols, RT}, q_map = {q.data(), rows, RT, RT, STRIP, 2, RT * 2};
  next_map = {x.data(), rows, next.cols, next.cols, LOAD_ROWS}, s_map = {s.data(), rows, RT, RT, STRIP, 2, RT * 2};
  // Those of z are given, those of the other matrix are drawn.
  int bits_cols = BITS ? next.cols : cols;
  auto expected = bits_of_matrix(dropout, rows, bits_cols), keep = expected;
  if (BITS) std::fill(keep.begin(), keep.end(), NOT_STORED);
  bits = {keep.data(), rows, bits_cols, dropout};

  launch(run, {(u32)(group * blocks), 1}, THREADS, DOWN ? group : 1);
  if (keep != expected) fail("bits that are drawn are wrong");
  write(s), write(part), write(next_part);
  return 0;
}
