//! `rope`, `rope_i` and `rope_thd`.

use candle_core::{DType, Result, Tensor, Var};
use lora_core::nn::{rope, rope_i, rope_thd};

use crate::oracle::{
    assert_close, assert_gradients, assert_half_types, assert_same, random, strided,
    value_and_grads,
};

type Rope = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

fn thd_slow(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let xs = xs.transpose(1, 2)?;
    candle_nn::rotary_emb::rope_slow(&xs, cos, sin)?.transpose(1, 2)
}

/// Every rope with its slow twin.
const ROPES: [(Rope, Rope); 3] = [
    (rope, candle_nn::rotary_emb::rope_slow),
    (rope_i, candle_nn::rotary_emb::rope_i_slow),
    (rope_thd, thd_slow),
];

/// Tables of `positions` for heads of `d` numbers.
fn angles(shape: &[usize]) -> (Tensor, Tensor) {
    let angles = random(shape, 7);
    (angles.cos().unwrap(), angles.sin().unwrap())
}

fn to_dtype_of((cos, sin): &(Tensor, Tensor), xs: &Tensor) -> (Tensor, Tensor) {
    let convert = |table: &Tensor| table.to_dtype(xs.dtype()).unwrap();
    (convert(cos), convert(sin))
}

#[test]
fn ropes_equal_the_slow_composition() {
    for (fused, slow) in ROPES {
        for shape in [[2, 3, 5, 6], [1, 1, 1, 2], [2, 5, 3, 34], [1, 70, 9, 64]] {
            // More positions than tokens.
            let tables = angles(&[80, shape[3] / 2]);
            let with = |rope: Rope| {
                let tables = &tables;
                move |args: &[Tensor]| {
                    let (cos, sin) = to_dtype_of(tables, &args[0]);
                    rope(&args[0], &cos, &sin)
                }
            };
            let xs = [random(&shape, 1)];
            assert_same(&with(fused), &with(slow), &xs, DType::F64, 1e-14);
            assert_same(&with(fused), &with(slow), &xs, DType::F32, 1e-6);
        }
    }
}

#[test]
fn rope_gradients_are_central_differences() {
    for (fused, _) in ROPES {
        let (cos, sin) = angles(&[4, 3]);
        assert_gradients(
            &|args| fused(&args[0], &cos, &sin),
            &[random(&[2, 4, 3, 6], 1)],
        );
    }
}

#[test]
fn trained_tables_get_their_gradients() {
    for (fused, _) in ROPES {
        let (cos, sin) = angles(&[4, 3]);
        let inputs = [random(&[2, 4, 3, 6], 1), cos, sin];
        assert_gradients(&|args| fused(&args[0], &args[1], &args[2]), &inputs);
    }
}

#[test]
fn ropes_in_half_types_round_once() {
    for (fused, _) in ROPES {
        // The tables are rounded to bf16 first, so that they are the same in every type but f16's.
        let (cos, sin) = angles(&[4, 3]);
        let round = |table: &Tensor| ((table * 64.0).unwrap().round().unwrap() / 64.0).unwrap();
        let tables = (round(&cos), round(&sin));
        let op = |args: &[Tensor]| {
            let (cos, sin) = to_dtype_of(&tables, &args[0]);
            fused(&args[0], &cos, &sin)
        };
        assert_half_types(&op, &[random(&[2, 4, 3, 6], 1)], 1.0);
    }
}

#[test]
fn each_batch_has_its_table_when_there_are_three_dimensions() {
    for (fused, _) in ROPES {
        let xs = random(&[2, 3, 4, 6], 1);
        let (cos, sin) = angles(&[2, 5, 3]);
        let whole = fused(&xs, &cos, &sin).unwrap();
        for i in 0..2 {
            let one = |t: &Tensor| t.narrow(0, i, 1).unwrap().contiguous().unwrap();
            let (cos, sin) = (one(&cos).squeeze(0).unwrap(), one(&sin).squeeze(0).unwrap());
            assert_close(
                "batch",
                &one(&whole),
                &fused(&one(&xs), &cos, &sin).unwrap(),
                0.0,
            );
        }
        // The differentiable composition, taken when a table is trained, agrees.
        let cos = Var::from_tensor(&cos).unwrap();
        assert_close("composed", &fused(&xs, &cos, &sin).unwrap(), &whole, 1e-14);
    }
}

#[test]
fn ropes_take_any_strides_and_no_rows() {
    for (fused, _) in ROPES {
        let (cos, sin) = angles(&[5, 3]);
        let plain = |args: &[Tensor]| fused(&args[0], &cos, &sin);
        let turned = |args: &[Tensor]| fused(&strided(&args[0]), &cos, &sin);
        assert_same(
            &turned,
            &plain,
            &[random(&[2, 3, 4, 6], 1)],
            DType::F64,
            0.0,
        );
        let (ys, grads) = value_and_grads(&plain, &[random(&[0, 3, 4, 6], 1)]);
        assert_eq!(ys.dims(), [0, 3, 4, 6]);
        assert_eq!(grads[0].dims(), [0, 3, 4, 6]);
    }
}

#[test]
fn tables_that_do_not_fit_name_the_shapes() {
    let (cos, sin) = angles(&[2, 3]);
    for (fused, _) in ROPES {
        let error = fused(&random(&[1, 4, 4, 6], 1), &cos, &sin)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("[1, 4, 4, 6]") && error.contains("[2, 3]"),
            "{error}"
        );
        assert!(fused(&random(&[1, 2, 2, 8], 1), &cos, &sin).is_err());
        assert!(fused(&random(&[1, 2, 2, 7], 1), &cos, &sin).is_err());
    }
}
