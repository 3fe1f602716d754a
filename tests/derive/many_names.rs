//! Forty names, six levels deep, twenty patterns: not too long for the compiler to check.
#![deny(long_running_const_eval)]
#![allow(dead_code)]

use lora_core::{LoraTargets, nn::Linear, targets};

#[derive(LoraTargets)]
struct Level0 {
    projection_number_0: Linear,
    projection_number_1: Linear,
    projection_number_2: Linear,
    projection_number_3: Linear,
    projection_number_4: Linear,
    projection_number_5: Linear,
    projection_number_6: Linear,
    projection_number_7: Linear,
    projection_number_8: Linear,
    projection_number_9: Linear,
}

#[derive(LoraTargets)]
struct Level1 {
    projection_number_10: Linear,
    projection_number_11: Linear,
    projection_number_12: Linear,
    projection_number_13: Linear,
    projection_number_14: Linear,
    projection_number_15: Linear,
    left_branch: Vec<Level0>,
    right_branch: Option<Level0>,
}

#[derive(LoraTargets)]
struct Level2 {
    projection_number_16: Linear,
    projection_number_17: Linear,
    projection_number_18: Linear,
    projection_number_19: Linear,
    projection_number_20: Linear,
    projection_number_21: Linear,
    left_branch: Vec<Level1>,
    right_branch: Option<Level1>,
}

#[derive(LoraTargets)]
struct Level3 {
    projection_number_22: Linear,
    projection_number_23: Linear,
    projection_number_24: Linear,
    projection_number_25: Linear,
    projection_number_26: Linear,
    projection_number_27: Linear,
    left_branch: Vec<Level2>,
    right_branch: Option<Level2>,
}

#[derive(LoraTargets)]
struct Level4 {
    projection_number_28: Linear,
    projection_number_29: Linear,
    projection_number_30: Linear,
    projection_number_31: Linear,
    projection_number_32: Linear,
    projection_number_33: Linear,
    left_branch: Vec<Level3>,
    right_branch: Option<Level3>,
}

#[derive(LoraTargets)]
struct Level5 {
    projection_number_34: Linear,
    projection_number_35: Linear,
    projection_number_36: Linear,
    projection_number_37: Linear,
    projection_number_38: Linear,
    projection_number_39: Linear,
    left_branch: Vec<Level4>,
    right_branch: Option<Level4>,
}

#[test]
fn all_are_found() {
    let names = targets!(Level5: [
        "*.projection_number_0",
        "*left_branch.*.projection_number_2",
        "*left_branch.*.projection_number_4",
        "*.projection_number_6",
        "*left_branch.*.projection_number_8",
        "*left_branch.*.projection_number_10",
        "*.projection_number_12",
        "*left_branch.*.projection_number_14",
        "*left_branch.*.projection_number_16",
        "*.projection_number_18",
        "*left_branch.*.projection_number_20",
        "*left_branch.*.projection_number_22",
        "*.projection_number_24",
        "*left_branch.*.projection_number_26",
        "*left_branch.*.projection_number_28",
        "*.projection_number_30",
        "*left_branch.*.projection_number_32",
        "*left_branch.*.projection_number_17",
        "*.projection_number_18",
        "*left_branch.*.projection_number_19",
    ]);
    assert_eq!(names.len(), 20);
}
