//! Masks on Hopper: drawn by the kernel that applies them, or read as bits that an earlier one drew.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};

use crate::dropout::Mask;
use crate::error::Result;
use crate::kernels::Kernel;
use crate::launch::{Grid, Launcher, arg};

/// How a kernel gets the mask of a matrix.
#[derive(Clone, Copy)]
pub(crate) enum Masking<'a> {
    /// Nothing is dropped.
    Off,
    /// Drawn from the counter.
    Drawn(Mask),
    /// Read; for the products with an input gradient, which would draw it twice.
    Read(&'a Bits),
}

impl<'a> Masking<'a> {
    /// Drawn if there is a mask.
    pub fn drawn(mask: Option<Mask>) -> Self {
        mask.map_or(Self::Off, Self::Drawn)
    }

    /// The `DROPOUT` option of the Hopper kernels.
    pub fn define(&self) -> u32 {
        match self {
            Self::Off => 0,
            Self::Drawn(_) => 1,
            Self::Read(_) => 2,
        }
    }

    pub fn mask(&self) -> Option<Mask> {
        match self {
            Self::Off => None,
            Self::Drawn(mask) => Some(*mask),
            Self::Read(bits) => Some(bits.mask),
        }
    }

    pub fn bits(&self) -> Option<&'a Bits> {
        match self {
            Self::Read(bits) => Some(bits),
            _ => None,
        }
    }
}

/// The mask of a matrix `[rows, cols]`, a bit an element, laid out as bits.cuh says.
pub(crate) struct Bits {
    keep: CudaSlice<u32>,
    rows: usize,
    cols: usize,
    mask: Mask,
}

/// [`Bits`] as a kernel's argument, laid out as in sweep.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct BitsArg {
    pub keep: u64,
    rows: i32,
    cols: i32,
    mask: Mask,
}

// SAFETY: plain words in the layout of the kernel's struct `Bits`.
unsafe impl DeviceRepr for BitsArg {}

impl Bits {
    /// The argument, with the address that a guard gave.
    pub fn arg(&self, keep: u64) -> BitsArg {
        BitsArg {
            keep,
            rows: self.rows as i32,
            cols: self.cols as i32,
            mask: self.mask,
        }
    }

    pub fn keep(&self) -> &CudaSlice<u32> {
        &self.keep
    }

    pub fn keep_mut(&mut self) -> &mut CudaSlice<u32> {
        &mut self.keep
    }
}

impl Launcher<'_> {
    /// Room for the bits of a mask of `[rows, cols]`, which are still to be drawn.
    pub fn bits(&self, (rows, cols): (usize, usize), mask: Mask) -> Result<Bits> {
        Ok(Bits {
            keep: self.alloc(
                "the bits of a mask",
                rows.div_ceil(32) * 32 * cols.div_ceil(128) * 4,
            )?,
            rows,
            cols,
            mask,
        })
    }

    /// Draws `bits` in a pass of their own.
    pub fn draw(&self, bits: &mut Bits) -> Result<()> {
        if bits.rows == 0 {
            return Ok(());
        }
        let defines = vec![("DTYPE", 1), ("ALIGNED", 1)];
        let function = self.function(Kernel::Bits, defines)?;
        let (rows, cols, mask) = (bits.rows as i32, bits.cols as i32, bits.mask);
        let units = bits.rows.div_ceil(32) * bits.cols.div_ceil(128);
        let (at, _keep) = bits.keep.device_ptr_mut(self.stream);
        let blocks = units.div_ceil(8).min(8 * self.kernels.multiprocessors());
        let grid = Grid::new([blocks as u32, 1, 1], 256);
        let args = [arg(&at), arg(&rows), arg(&cols), arg(&mask)];
        // SAFETY: arguments in the order of bits.cu; there is room for every row and 128 columns.
        unsafe { self.launch("launch of bits", &function, grid, &args) }
    }

    /// The address of the bits of `masking`, or null.
    pub fn bits_address(&self, masking: Masking) -> u64 {
        masking
            .bits()
            .map_or(0, |bits| bits.keep.device_ptr(self.stream).0)
    }
}
