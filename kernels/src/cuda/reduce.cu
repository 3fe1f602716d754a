// Up to eight gradients a launch, from their partial sums.
struct Jobs {
  Sum job[8];
};

template <int WIDE>
__device__ __forceinline__ void add_units(const Sum& sum) {
  int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, warps = gridDim.x * (blockDim.x / 32);
  for (int unit = warp; unit < units_of<WIDE>(sum); unit += warps) add_up<WIDE>(sum, unit, threadIdx.x & 31);
}

extern "C" __global__ void __launch_bounds__(256) reduce(const __grid_constant__ Jobs jobs) {
  await_previous();
  start_next();
  const Sum& sum = jobs.job[blockIdx.y];
  if (sum.cols % 4 == 0) add_units<4>(sum);
  else add_units<1>(sum);
}
