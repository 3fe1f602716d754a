//! The big products by cuBLASLt: `y (+)= x Wᵀ` and `dx (+)= dY W`.
//!
//! A plan holds the descriptors and the algorithm of one shape, dtype and alignment. Large products
//! time the candidates once, at their first use; split-K that reduces in half precision is excluded.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::{MaybeUninit, size_of};
use std::panic;
use std::ptr;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasLtMatmulDescAttributes_t as Desc, cublasLtMatmulPreferenceAttributes_t as Pref,
};
use cudarc::driver::sys::{CUevent_flags, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut};

use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::kernels::lock;

const WORKSPACE: usize = 32 << 20;
const CANDIDATES: usize = 8;
/// Products with fewer multiplications than this take the library's first choice.
const WORTH_TIMING: usize = 1 << 28;

/// Which product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Product {
    /// `out[rows, w_rows] = in[rows, w_cols] Wᵀ`
    Forward,
    /// `out[rows, w_cols] = in[rows, w_rows] W`
    Backward,
}

/// Arithmetic of f32 products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum F32Math {
    /// Full f32.
    #[default]
    Exact,
    /// Operands rounded to tf32 (10 mantissa bits) in the base product.
    Tf32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub product: Product,
    pub rows: usize,
    pub w_rows: usize,
    pub w_cols: usize,
    /// Row stride of the input.
    pub stride: usize,
    /// Add to the output instead of overwriting it.
    pub accumulate: bool,
    pub math: F32Math,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    shape: Shape,
    dtype: DType,
    /// Largest power of two, up to 256, that divides the address: weight, input, output.
    align: [u32; 3],
}

/// A cuBLASLt handle with its plans.
#[derive(Debug)]
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Key, Arc<Plan>>>,
}

// SAFETY: cuBLASLt handles may be used from several threads at once; plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        context
            .bind_to_thread()
            .map_err(Error::driver("context switch"))?;
        match panic::catch_unwind(result::create_handle) {
            Ok(Ok(handle)) => Ok(Self {
                handle,
                plans: Mutex::default(),
            }),
            Ok(Err(e)) => Err(Error::MissingLibrary {
                library: "cublasLt",
                reason: e.to_string(),
            }),
            Err(_) => Err(Error::MissingLibrary {
                library: "cublasLt",
                reason: "not found".into(),
            }),
        }
    }

    /// `out (+)= input · op(w)`, on `stream`.
    pub fn run<T: Element>(
        &self,
        stream: &Arc<CudaStream>,
        shape: Shape,
        w: &CudaView<T>,
        input: &CudaView<T>,
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        stream
            .context()
            .bind_to_thread()
            .map_err(Error::driver("context switch"))?;
        let count = out.len();
        let (w, _w) = w.device_ptr(stream);
        let (input, _input) = input.device_ptr(stream);
        let (out, _out) = out.device_ptr_mut(stream);
        let key = Key {
            shape,
            dtype: T::DTYPE,
            align: [w, input, out].map(alignment),
        };
        let operands = Operands {
            w: w as _,
            input: input as _,
            c: out as _,
            d: out as _,
        };
        let plan = self.plan(stream, key, operands, count)?;
        self.launch(stream, &plan, &plan.algo, plan.workspace, operands)
    }

    fn plan(
        &self,
        stream: &Arc<CudaStream>,
        key: Key,
        operands: Operands,
        count: usize,
    ) -> Result<Arc<Plan>> {
        let mut plans = lock(&self.plans);
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        let (mut plan, candidates) = self.candidates(key)?;
        let multiplications = key
            .shape
            .rows
            .saturating_mul(key.shape.w_rows)
            .saturating_mul(key.shape.w_cols);
        let capturing = stream
            .capture_status()
            .is_ok_and(|s| s != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
        if candidates.len() > 1 && multiplications >= WORTH_TIMING && !capturing {
            // Timed into a spare output; without room for one the first candidate stands. Where it adds, in place, on
            // zeros, as it is going to run: the library has other kernels for that.
            if let Ok(mut spare) = stream.alloc_zeros::<u8>(count * key.dtype.bytes()) {
                let (d, _guard) = spare.device_ptr_mut(stream);
                let operands = Operands {
                    c: d as _,
                    d: d as _,
                    ..operands
                };
                let mut best = f32::INFINITY;
                for candidate in &candidates {
                    if let Ok(ms) = self.time(stream, &plan, candidate, operands)
                        && ms < best
                    {
                        best = ms;
                        (plan.algo, plan.workspace) = (candidate.algo, candidate.workspaceSize);
                    }
                }
            }
        }
        let plan = Arc::new(plan);
        plans.insert(key, plan.clone());
        Ok(plan)
    }

    /// Milliseconds of the fastest of a few runs.
    fn time(
        &self,
        stream: &Arc<CudaStream>,
        plan: &Plan,
        candidate: &sys::cublasLtMatmulHeuristicResult_t,
        operands: Operands,
    ) -> Result<f32> {
        let event = || {
            stream
                .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
                .map_err(Error::driver("event"))
        };
        let mut best = f32::INFINITY;
        for _ in 0..4 {
            let start = event()?;
            self.launch(
                stream,
                plan,
                &candidate.algo,
                candidate.workspaceSize,
                operands,
            )?;
            best = best.min(
                start
                    .elapsed_ms(&event()?)
                    .map_err(Error::driver("event"))?,
            );
        }
        Ok(best)
    }

    fn launch(
        &self,
        stream: &Arc<CudaStream>,
        plan: &Plan,
        algo: &sys::cublasLtMatmulAlgo_t,
        workspace: usize,
        operands: Operands,
    ) -> Result<()> {
        let mut scratch = match workspace {
            0 => None,
            bytes => Some(
                // SAFETY: scratch memory, written before it is read by the library.
                unsafe { stream.alloc::<u8>(bytes) }
                    .map_err(Error::allocation("the workspace of cuBLASLt", bytes))?,
            ),
        };
        let scratch = scratch.as_mut().map(|s| s.device_ptr_mut(stream));
        let scratch_ptr = scratch
            .as_ref()
            .map_or(ptr::null_mut(), |(p, _)| *p as *mut c_void);
        let (alpha, beta) = (
            1.0_f32,
            if plan.key.shape.accumulate {
                1.0_f32
            } else {
                0.0
            },
        );
        // SAFETY: the descriptors are alive in `plan`; the caller's views cover the shapes of the key.
        unsafe {
            result::matmul(
                self.handle,
                plan.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                operands.w,
                plan.w,
                operands.input,
                plan.input,
                operands.c,
                plan.out,
                operands.d,
                plan.out,
                algo,
                scratch_ptr,
                workspace,
                stream.cu_stream().cast(),
            )
        }
        .map_err(plan.key.error("cublasLtMatmul"))
    }

    /// Descriptors and the library's candidates, best first by its own model.
    fn candidates(&self, key: Key) -> Result<(Plan, Vec<sys::cublasLtMatmulHeuristicResult_t>)> {
        let Key {
            shape,
            dtype,
            align,
        } = key;
        let fail = |call| key.error(call);
        let compute = match (dtype, shape.math) {
            (DType::F32, F32Math::Tf32) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let mut plan = Plan {
            key,
            desc: ptr::null_mut(),
            w: ptr::null_mut(),
            input: ptr::null_mut(),
            out: ptr::null_mut(),
            // SAFETY: an opaque array of integers, overwritten below.
            algo: unsafe { MaybeUninit::zeroed().assume_init() },
            workspace: 0,
        };
        // Row-major matrices are the library's column-major ones, transposed:
        // outᵀ[n, rows] = op(W)[n, k] · inputᵀ[k, rows].
        // The operation is CUBLAS_OP_T = 1 or CUBLAS_OP_N = 0.
        let (transpose, k, n) = match shape.product {
            Product::Forward => (1_i32, shape.w_cols, shape.w_rows),
            Product::Backward => (0_i32, shape.w_rows, shape.w_cols),
        };
        let layout = |rows: usize, cols: usize, ld: usize| {
            result::create_matrix_layout(dtype.cuda_type(), rows as u64, cols as u64, ld as i64)
        };
        plan.desc = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)
            .map_err(fail("descriptor"))?;
        plan.w = layout(shape.w_cols, shape.w_rows, shape.w_cols).map_err(fail("layout"))?;
        plan.input = layout(k, shape.rows, shape.stride).map_err(fail("layout"))?;
        plan.out = layout(n, shape.rows, n).map_err(fail("layout"))?;
        // SAFETY: the descriptor is alive and the value has the size the attribute asks for.
        unsafe {
            result::set_matmul_desc_attribute(
                plan.desc,
                Desc::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transpose).cast(),
                size_of_val(&transpose),
            )
        }
        .map_err(fail("descriptor"))?;

        let preference = Preference(result::create_matmul_pref().map_err(fail("preference"))?);
        let reduction =
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference
            .set(Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)
            .map_err(fail("preference"))?;
        preference
            .set(Pref::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction)
            .map_err(fail("preference"))?;
        for (attribute, bytes) in [
            (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align[0]),
            (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align[1]),
            (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align[2]),
            (Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align[2]),
        ] {
            preference
                .set(attribute, &bytes)
                .map_err(fail("preference"))?;
        }

        let mut found =
            [const { MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: all objects are alive; `found` has room for the number of results asked for.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.desc,
                plan.w,
                plan.input,
                plan.out,
                plan.out,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            )
        }
        .result()
        .map_err(fail("cublasLtMatmulAlgoGetHeuristic"))?;
        // SAFETY: the library filled the first `count` results; the rest is not looked at.
        let candidates: Vec<_> = found[..count as usize]
            .iter()
            // SAFETY: as above, and zeroed before.
            .map(|r| unsafe { r.assume_init() })
            .filter(|r| r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .collect();
        let first = candidates.first().ok_or_else(|| {
            fail("cublasLtMatmulAlgoGetHeuristic")(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            ))
        })?;
        (plan.algo, plan.workspace) = (first.algo, first.workspaceSize);
        Ok((plan, candidates))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: created in `new` and destroyed once, here.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Key {
    fn error(self, call: &'static str) -> impl FnOnce(CublasError) -> Error {
        move |e| Error::Blas {
            call,
            status: e.to_string(),
            shape: format!("{:?} in {:?}", self.shape, self.dtype),
        }
    }
}

/// Device addresses of one product: `d = op(w) · input (+ c)`.
#[derive(Clone, Copy)]
struct Operands {
    w: *const c_void,
    input: *const c_void,
    c: *const c_void,
    d: *mut c_void,
}

#[derive(Debug)]
struct Plan {
    key: Key,
    desc: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

// SAFETY: descriptors are plain host memory, read-only once the plan is built.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in [self.w, self.input, self.out]
            .into_iter()
            .filter(|l| !l.is_null())
        {
            // SAFETY: created in `candidates` and destroyed once, here.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        if !self.desc.is_null() {
            // SAFETY: as above.
            let _ = unsafe { result::destroy_matmul_desc(self.desc) };
        }
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn set<V>(&self, attribute: Pref, value: &V) -> std::result::Result<(), CublasError> {
        // SAFETY: the preference is alive; `value` is valid for reads of its size.
        unsafe {
            result::set_matmul_pref_attribute(
                self.0,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<V>(),
            )
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by `create_matmul_pref` and destroyed once, here.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}
