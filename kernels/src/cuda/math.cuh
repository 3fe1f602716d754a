// Hopper: a warpgroup that multiplies the steps of the depth as they come. Options: BACKWARD, RANK_STEPS.

// A place in the ring of stages.
struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

struct Math {
  u32 stages, full, empty;        // as in gemm.cu
  int group, thread, lane, warp;  // the warpgroup, 0 or 1, and of it
  Ring ring;
  int previous;  // the stage before
  float d[128];  // of a thread: the sums of two rows, as wgmma has them

  __device__ __forceinline__ Math(u32 stages, u32 full, u32 empty) : stages(stages), full(full), empty(empty) {
    group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = thread & 31, warp = thread / 32;
  }
  __device__ __forceinline__ u32 at(int stage) const { return stages + stage * STAGE_BYTES; }
  __device__ __forceinline__ u64 input(int stage) const { return descriptor(at(stage) + group * (INPUT_BYTES / 2), 16); }
  __device__ __forceinline__ u64 weight(int stage) const { return descriptor(at(stage) + INPUT_BYTES, BACKWARD ? WEIGHT_COLS_BYTES : 16); }
  __device__ __forceinline__ void await() const { barrier_wait(full + 8 * ring.stage, ring.parity); }
  // In both blocks of the cluster, which load it together.
  __device__ __forceinline__ void release(int stage) const {
    if (thread < CLUSTER) barrier_arrive_at(empty + 8 * stage, thread);
  }
  __device__ __forceinline__ void multiply(int stage, bool add) {
    u64 left = input(stage), right = weight(stage);
#pragma unroll
    for (int step = 0; step < TILE_DEPTH / 16; ++step) wgmma<BACKWARD>(d, left + step * DEPTH_STEP, right + step * WEIGHT_STEP, add || step > 0);
  }
  __device__ __forceinline__ void multiply_rank(int stage, bool add) {
    u64 left = input(stage), right = weight(stage);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < RANK_STEPS; ++step) wgmma<BACKWARD>(d, left + step * DEPTH_STEP, right + step * WEIGHT_STEP, add || step > 0);
    wgmma_commit();
  }
};
