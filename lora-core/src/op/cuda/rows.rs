//! Tensors seen as the kernels' matrices of activations.

use candle_core::{CudaStorage, Layout, Result, Tensor, bail};
use lora_kernels::Rows;

use super::Number;

/// `xs` itself if it can be seen as rows, else a copy without gaps.
pub(super) fn seen_as_rows(xs: &Tensor) -> Result<Tensor> {
    match Place::of(xs.layout()) {
        Some(_) => Ok(xs.clone()),
        None => xs.contiguous(),
    }
}

/// The matrix of a tensor that [`seen_as_rows`] gave.
pub(super) fn rows<'a, T: Number>(
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<Rows<'a, T>> {
    let Some(place) = Place::of(layout) else {
        bail!("the kernels expect rows of packed elements, got {layout:?}")
    };
    let elements = match place.rows {
        0 => 0,
        rows => (rows - 1) * place.stride + place.cols,
    };
    let start = if elements == 0 { 0 } else { place.start };
    Ok(Rows {
        data: storage.as_cuda_slice::<T>()?.slice(start..start + elements),
        rows: place.rows,
        cols: place.cols,
        stride: place.stride,
    })
}

/// Where the rows of a tensor `[.., width]` stand in its storage.
struct Place {
    start: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Place {
    /// `None` if the elements of a row are not packed, or rows overlap or are not equally far apart.
    fn of(layout: &Layout) -> Option<Self> {
        let (&cols, leading) = layout.dims().split_last()?;
        let (&step, strides) = layout.stride().split_last()?;
        if step != 1 && cols > 1 {
            return None;
        }
        let rows = leading.iter().product();
        let mut stride = None;
        let mut next = 0; // what the next dimension outwards must step by
        for (&size, &step) in leading.iter().zip(strides).rev() {
            if size == 1 {
                continue;
            }
            if stride.is_some() && step != next {
                return None;
            }
            stride.get_or_insert(step);
            next = step * size;
        }
        let stride = stride.unwrap_or(cols);
        (stride >= cols || rows == 0).then_some(Self {
            start: layout.start_offset(),
            rows,
            cols,
            stride: stride.max(cols),
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::Place;

    fn place(tensor: candle_core::Result<Tensor>) -> Option<[usize; 4]> {
        let place = Place::of(tensor.expect("a view").layout())?;
        Some([place.start, place.rows, place.cols, place.stride])
    }

    #[test]
    fn views_with_equally_spaced_rows_need_no_copy() {
        let xs = Tensor::zeros((3, 4, 10), DType::F32, &Device::Cpu).expect("a tensor");
        assert_eq!(place(Ok(xs.clone())), Some([0, 12, 10, 10]));
        assert_eq!(place(xs.narrow(2, 3, 5)), Some([3, 12, 5, 10]));
        assert_eq!(place(xs.narrow(0, 1, 2)), Some([40, 8, 10, 10]));
        assert_eq!(place(xs.narrow(1, 1, 1)), Some([10, 3, 10, 40]));
        assert_eq!(place(xs.narrow(1, 1, 2)), None);
        assert_eq!(place(xs.transpose(0, 1)), None);
        assert_eq!(place(xs.transpose(1, 2)), None);
        assert_eq!(
            place(xs.get(0).and_then(|xs| xs.get(2))),
            Some([20, 1, 10, 10])
        );
        let row = xs.get(0).and_then(|xs| xs.narrow(0, 0, 1));
        assert_eq!(place(row.and_then(|row| row.broadcast_as((6, 10)))), None);
        assert_eq!(place(xs.narrow(0, 3, 0)), Some([120, 0, 10, 10]));
    }
}
