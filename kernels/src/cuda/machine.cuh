// Instructions of sm_80 and newer, as functions.
//
// Options: DTYPE.
// ---- order of kernels ------------------------------------------------------------------------
// A kernel starts while the one before it drains. It must await that one before it reads what it
// wrote, and before it writes anything: memory freed by an earlier kernel of the stream is reused.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel of the stream start on multiprocessors that have room for it.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Brings a line to the L2 cache, where a kernel that has yet to write it would still be heard: safe
// before `await_previous`.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- conversions ---------------------------------------------------------------------------
__device__ __forceinline__ float to_float(T v) {
#if DTYPE == 0
  return v;
#elif DTYPE == 1
  return __uint_as_float((u32)v << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}

__device__ __forceinline__ T from_float(float f) {
#if DTYPE == 0
  return f;
#elif DTYPE == 1
  T v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
#else
  T v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
#endif
}

#if DTYPE != 0
// Two floats to one word, `lo` in the low half.
__device__ __forceinline__ u32 pack_halves(float lo, float hi) {
  u32 w;
#if DTYPE == 1
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
#endif
  return w;
}
#endif

// ---- tensor cores ----------------------------------------------------------------------------
// c[16 x 8] += a[16 x 8 or 16] * b, fragments of mma.m16n8.
#if DTYPE == 0
__device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ u32 tf32_of(float f) {
  u32 w;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(w) : "f"(f));
  return w;
}
#else
#if DTYPE == 1
#define HALF_NAME "bf16"
#else
#define HALF_NAME "f16"
#endif
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." HALF_NAME "." HALF_NAME
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

// ---- memory between blocks -------------------------------------------------------------------
// Counts behind what this thread wrote and saw written, and sees what others wrote before they did.
__device__ __forceinline__ u32 count_up(u32* flag) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(flag), "r"(1) : "memory");
  return old;
}
__device__ __forceinline__ void await_count(const u32* flag, u32 count) {
  u32 found;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  while (found < count);
}

// ---- registers -------------------------------------------------------------------------------
// Halves filled with the signs of their low bytes.
__device__ __forceinline__ u32 signs_of_halves(u32 v) {
  u32 signs;
  asm("prmt.b32 %0, %1, %1, 0xaa88;" : "=r"(signs) : "r"(v));
  return signs;
}
// And of their high bytes.
__device__ __forceinline__ u32 high_signs_of_halves(u32 v) {
  u32 signs;
  asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(signs) : "r"(v));
  return signs;
}
// What follows from `v` is computed from here on.
__device__ __forceinline__ void late(int& v) { asm volatile("" : "+r"(v)); }
// Loads a word at this place in the program.
__device__ __forceinline__ u32 load_here(const u32* p) {
  u32 v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// Zero, at this place in the program.
__device__ __forceinline__ float zero_here() {
  float zero;
  asm volatile("mov.f32 %0, 0f00000000;" : "=f"(zero));
  return zero;
}
// Threads of a block that meet at barrier `id` of 1 to 15.
template <int COUNT>
__device__ __forceinline__ void sync_some(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}
