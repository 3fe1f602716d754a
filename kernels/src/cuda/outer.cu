// part[split, j, c] = sum over the rows m of a split of q[m, j] * D(z)[m, c]; `reduce` adds the splits.
// Options: RT ranks a block, a multiple of 16, of 32 above 32.
constexpr int WARPS = 8;
typedef Outer<WARPS, RT, (RT == 16 && !DROPOUT && DTYPE != 0 ? 4 : 2), DROPOUT> Block;

extern "C" __global__ void __launch_bounds__(WARPS * 32, RT <= 16 || !DROPOUT ? 2 : 1) outer(
    const T* __restrict__ z,    // [rows, cols], row stride ldz
    const T* __restrict__ q,    // [rows, ldq]
    float* __restrict__ part,   // [splits, ranks, cols]
    i64 rows, i64 ldz, int cols, int ldq, i64 rows_per_split, Dropout dropout) {
  __shared__ Block::Sums sums;
  i64 begin = (i64)blockIdx.y * rows_per_split, end = min(begin + rows_per_split, rows);
  int rank0 = blockIdx.z * RT, ranks = gridDim.z * RT;
  Block::run(z, q + rank0, part + ((i64)blockIdx.y * ranks + rank0) * cols, begin, end, blockIdx.x * OUTER_COLS, ldz, cols, ldq, dropout, sums);
}
