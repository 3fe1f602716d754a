// Hopper: the mask of a matrix [rows, cols] as bits, for kernels that read it more than once.
extern "C" __global__ void __launch_bounds__(256) bits(u32* __restrict__ keep, int rows, int cols, Dropout dropout) {
  await_previous();
  start_next();
  int units = (rows + 31) / 32 * ((cols + 127) / 128);
  for (int unit = (blockIdx.x * 256 + threadIdx.x) / 32; unit < units; unit += gridDim.x * 8)
    store_bits(dropout, keep, unit, rows, cols, threadIdx.x & 31);
}
