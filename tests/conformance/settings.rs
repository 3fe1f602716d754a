//! Adapters that PEFT saved with each of its settings: the function, its gradients, the merge.

use lora_core::LoraTargets;
use lora_examples::any_model::AnyModel;

use crate::support::{Case, open};

fn load(case: &Case) -> AnyModel {
    let mut model = open(&case.base);
    let loaded = model.load_adapter(case.dir());
    loaded.unwrap_or_else(|error| panic!("{}: {error}", case.name));
    model
}

#[test]
fn adapters_compute_what_pefts_do() {
    for case in Case::all() {
        case.assert_close("output", &case.forward(&load(&case)), 1e-5);
    }
}

#[test]
fn every_gradient_equals_pefts() {
    for case in Case::all() {
        let mut model = load(&case);
        let loss = case.forward(&model).mul(&case.expected["cotangent"]);
        let grads = loss.unwrap().sum_all().unwrap().backward().unwrap();
        let mut checked = 0;
        for (name, var) in &model.named_lora_vars().unwrap() {
            // The hidden states of an encoder do not go through its pooler.
            if let Some(grad) = grads.get(var) {
                case.assert_close(&format!("grad.{name}"), grad, 2e-5);
                checked += 1;
            }
        }
        let expected = case.expected.keys();
        let expected = expected.filter(|key| key.starts_with("grad.")).count();
        assert_eq!(checked, expected, "{}", case.name);
    }
}

#[test]
fn merged_weights_and_their_function_equal_pefts() {
    for case in Case::all() {
        let mut model = load(&case);
        model.merge().unwrap();
        case.assert_close("merged_output", &case.forward(&model), 1e-5);
        let mut checked = 0;
        let visited = model.for_each_linear(&mut |path, linear| {
            let weight = format!("merged.{path}.weight");
            if case.expected.contains_key(&weight) {
                case.assert_close(&weight, linear.weight(), 1e-6);
                checked += 1;
            }
            let bias = format!("merged.{path}.bias");
            if case.expected.contains_key(&bias) {
                case.assert_close(&bias, linear.bias().unwrap(), 1e-6);
            }
            Ok(())
        });
        visited.unwrap();
        let sites = case.case["sites"].as_object().unwrap();
        assert_eq!(checked, sites.len(), "{}", case.name);
    }
}

/// Ranks, alphas and scalings of every site are those that PEFT gave its layers.
#[test]
fn sites_have_pefts_rank_alpha_and_scaling() {
    for case in Case::all() {
        let want = case.case["sites"].as_object().unwrap();
        let mut sites = 0;
        let visited = load(&case).for_each_adapter(&mut |lora| {
            let name = format!("{} of {}", lora.path(), case.name);
            let want = want.get(lora.path()).unwrap_or_else(|| panic!("{name}"));
            let number = |i: usize| want[i].as_f64().unwrap();
            assert_eq!(lora.rank() as f64, number(0), "{name}");
            assert!((lora.scaling() - number(2)).abs() < 1e-12, "{name}");
            sites += 1;
            Ok(())
        });
        visited.unwrap();
        assert_eq!(sites, want.len(), "{}", case.name);
    }
}
