// Shared by every kernel: 16-byte loads, the tensor core step, dropout.
//
// Options: DTYPE, ALIGNED 1 = rows of the wide operand start on 16 bytes and hold whole vectors; DROPOUT 1 = the kernel
// masks by counter (0: compiled out).

// Factors of S or dS, one for every 16 ranks; those behind the last take the last. As in skinny.rs.
struct Scales {
  float of[64];
};

__device__ __forceinline__ u32 bits_of(T v) {
#if DTYPE == 0
  return __float_as_uint(v);
#else
  return v;
#endif
}

// ---- loads ---------------------------------------------------------------------------------
// VEC elements of one row from column `col`; zero outside `cols` and for rows that are not `live`.
__device__ __forceinline__ Vec load_row(const T* row, int col, int cols, bool live) {
  Vec v = {{0, 0, 0, 0}};
#if ALIGNED
  if (live && col < cols) v = *reinterpret_cast<const Vec*>(row + col);
#else
  if (live) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      u32 bits = col + e < cols ? bits_of(row[col + e]) : 0;
      v.w[e * 4 / VEC] |= DTYPE == 0 ? bits : bits << (16 * (e & 1));
    }
  }
#endif
  return v;
}

__device__ __forceinline__ Vec load_packed(const T* p) { return *reinterpret_cast<const Vec*>(p); }
__device__ __forceinline__ HalfVec load_half_vec(const T* p) {
  return *reinterpret_cast<const HalfVec*>(p);
}

// ---- tensor core step ----------------------------------------------------------------------
// c[16 x 8] += a[16 x KSTEP] * b[KSTEP x 8], fragments of mma.m16n8. f32 operands are split in
// two tf32 parts (three products); the tensor core truncates sums, so each step starts at zero
// and is added to `c` with a rounded f32 add.
#if DTYPE == 0
__device__ __forceinline__ void split_tf32(u32 bits, u32& hi, u32& lo) {
  float f = __uint_as_float(bits);
  hi = tf32_of(f);
  lo = tf32_of(f - __uint_as_float(hi));
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  u32 ah[4], al[4], bh[2], bl[2];
  split_tf32(a0, ah[0], al[0]);
  split_tf32(a1, ah[1], al[1]);
  split_tf32(a2, ah[2], al[2]);
  split_tf32(a3, ah[3], al[3]);
  split_tf32(b0, bh[0], bl[0]);
  split_tf32(b1, bh[1], bl[1]);
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  mma_tf32(d, al, bh);
  mma_tf32(d, ah, bl);
  mma_tf32(d, ah, bh);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += d[i];
}
#endif

// ---- shared memory ---------------------------------------------------------------------------
// Address of 16-byte chunk `chunk` of a 128-byte row under the swizzle.
__device__ __forceinline__ u32 swizzled(u32 base, int row, int chunk) { return base + row * 128 + ((chunk ^ (row & 7)) << 4); }

// ---- dropout by counter --------------------------------------------------------------------
// Two blocks of Philox-4x32 with 7 rounds (Salmon et al., SC'11) decide on 32 elements of a row, a bit each:
// column 8j + 2t + c of 128 has bit j + 16c of word t, as threads of a quad have columns in accumulators. See
// dropout.rs.
struct Dropout {
  u64 step;
  u32 seed;       // low word of the seed xor its high word
  u32 site;
  u32 threshold;  // round(p * 2^32)
  float scale;    // 2^32 / (2^32 - threshold)
};

struct Draws {
  u32 w[4];
};

__device__ __forceinline__ Draws philox(const Dropout& d, u64 block) {
  u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = (u32)d.step, c3 = (u32)(d.step >> 32);
  u32 k0 = d.seed, k1 = d.site;
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    u32 hi0 = __umulhi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    u32 hi1 = __umulhi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The number of the first word of 128 columns, those with `col`, of a row of `cols`.
__device__ __forceinline__ u64 first_word(u64 row, int col, int cols) { return 4 * (row * ((cols + 127) / 128) + col / 128); }

// Word `number` of the mask: 1 for what is kept.
__device__ __forceinline__ u32 kept_word(const Dropout& d, u64 number) {
  // Two blocks are the bits, lowest first, of a byte an element. Of elements whose byte equals the threshold's, `tie`
  // decides.
  Draws lower = philox(d, 2 * number), upper = philox(d, 2 * number + 1);
  u32 tie = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    u32 both = lower.w[w] ^ upper.w[w];
    tie ^= __funnelshift_l(both, both, 8 * w);
  }
  u32 kept = tie < d.threshold << 8 ? 0 : ~0u;
#pragma unroll
  for (int place = 0; place < 8; ++place) {
    u32 bits = place < 4 ? lower.w[place] : upper.w[place - 4];
    u32 one = (int)(d.threshold << (7 - place)) >> 31;  // all bits, if that of the threshold is
    kept = (bits & kept) | (~one & (bits | kept));
  }
  return kept;
}

// Of VEC elements of a row from column `col` on, a multiple of VEC: bits 0 and 16 of word w are 1 for those of 2w and 2w + 1
// that are kept.
struct Kept {
  u32 w[HALF_VEC];
  // From the words of their 128 columns: `word(t)`.
  template <class Word>
  __device__ __forceinline__ static Kept of(int col, Word word) {
    Kept kept;
#pragma unroll
    for (int w = 0; w < HALF_VEC; ++w) kept.w[w] = word((col >> 1 & 3) + w) >> (col >> 3 & 15);
    return kept;
  }
  __device__ __forceinline__ bool operator[](int e) const { return w[e >> 1] >> (16 * (e & 1)) & 1; }
};

// Zeroes the dropped elements; survivors are scaled later, in f32.
__device__ __forceinline__ void drop(const Kept& kept, Vec& v) {
#pragma unroll
  for (int w = 0; w < 4; ++w)
#if DTYPE == 0
    if (!kept[w]) v.w[w] = 0;
#else
    v.w[w] &= (kept.w[w] & 0x00010001) * 0xffff;
#endif
}
