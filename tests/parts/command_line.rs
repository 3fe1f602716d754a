//! The `lora` program, without a process of its own.

use std::{fs, path::Path};

use clap::Parser;
use lora_examples::adapter_cli::{Command, Weighted};

use crate::golden;

/// The program's arguments.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

/// What the program says, with paths of golden files shortened.
fn lora(args: &[&str]) -> Result<String, String> {
    let args =
        Args::try_parse_from([&["lora"], args].concat()).map_err(|error| error.to_string())?;
    let said = args.command.run().map_err(|error| error.to_string())?;
    Ok(said)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The largest difference of a layer's deltas, relative to their norm.
fn difference(one: &Path, other: &Path) -> f64 {
    let json = lora(&["diff", "--json", text(one), text(other)]).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let sites = json["sites"].as_array().unwrap().iter();
    let number = |site: &serde_json::Value, name: &str| site[name].as_f64().unwrap();
    sites
        .map(|site| number(site, "norm") / number(site, "first_norm"))
        .fold(0.0, f64::max)
}

#[test]
fn names_in_files_do_not_command_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        fs::copy(
            golden("llama/untied/qv").join(file),
            folder.path().join(file),
        )
        .unwrap();
    }
    let config = folder.path().join("adapter_config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    json["base_model_name_or_path"] = "org/\u{1b}[2J\u{9b}1m\r".into();
    fs::write(&config, json.to_string()).unwrap();
    for options in [&["inspect"][..], &["inspect", "--json"]] {
        let said = lora(&[options, &[text(folder.path())]].concat()).unwrap();
        assert!(
            said.chars().all(|c| c == '\n' || !c.is_control()),
            "{said:?}"
        );
        assert!(said.contains("org/\\u001b[2J\\u009b1m\\"), "{said}");
    }
}

#[test]
fn inspect_prints_a_table_of_every_kind_of_file() {
    let qv = golden("llama/untied/qv");
    let table = lora(&["inspect", text(&qv)]).unwrap();
    let rows: Vec<_> = table.lines().collect();
    assert_eq!(
        rows[1].split_whitespace().take(7).collect::<Vec<_>>(),
        [
            "model.layers.0.self_attn.q_proj",
            "24",
            "x",
            "24",
            "4",
            "10",
            "2.5000"
        ]
    );
    assert!(table.contains("\n4 layers, 0 whole tensors; "), "{table}");
    let file = qv.join("adapter_model.safetensors");
    assert_eq!(lora(&["inspect", text(&file)]).unwrap(), table);

    for folder in ["pickled", "nemo", "minimal", "half"] {
        let folder = golden("folders/read").join(folder);
        let table = lora(&["inspect", text(&folder)]).unwrap();
        assert!(table.contains(" adapter parameters, "), "{table}");
    }
    let several = lora(&["inspect", text(&golden("several"))]).unwrap();
    for name in ["default", "late", "wide"] {
        assert!(
            several.contains(&format!("adapter `{name}`\n")),
            "{several}"
        );
    }
    let json = lora(&["inspect", "--json", text(&golden("several"))]).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["wide"]["sites"][0]["norm"].as_f64().unwrap() > 0.0);
}

#[test]
fn what_is_converted_does_the_same() {
    let temp = tempfile::tempdir().unwrap();
    for (name, folder) in [
        ("patterns", "llama/tied/patterns"),
        ("pickled", "folders/read/pickled"),
        ("nemo", "folders/read/nemo"),
    ] {
        let from = golden(folder);
        let (universal, peft) = (
            temp.path().join(name),
            temp.path().join(format!("{name}.peft")),
        );
        let said = lora(&["convert", text(&from), "--out", text(&universal)]).unwrap();
        assert!(
            said.ends_with(&format!(
                "to {} in the universal form\n",
                universal.display()
            )),
            "{said}"
        );
        lora(&[
            "convert",
            text(&universal),
            "--profile",
            "peft",
            "--out",
            text(&peft),
        ])
        .unwrap();
        for converted in [&universal, &peft] {
            assert!(difference(&from, converted) < 1e-7, "{name}");
        }
    }
    let error = lora(&[
        "convert",
        text(&golden("llama/untied/qv")),
        "--out",
        text(temp.path()),
    ]);
    assert!(
        error
            .unwrap_err()
            .ends_with("is not empty; name a folder that is not there yet")
    );
    let settings = golden("settings/encoder/lora_bias");
    let out = temp.path().join("refused");
    let error = lora(&["convert", text(&settings), "--out", text(&out)]).unwrap_err();
    assert!(error.contains("lora_bias") && !out.exists(), "{error}");
}

#[test]
fn two_adapters_differ_layer_by_layer() {
    let (one, two) = (
        golden("several/combined/one"),
        golden("several/combined/two"),
    );
    let said = lora(&["diff", text(&one), text(&two)]).unwrap();
    assert!(!said.contains("Both do the same"), "{said}");
    let said = lora(&["diff", text(&one), text(&one)]).unwrap();
    assert!(
        said.ends_with("Both do the same, up to rounding\n"),
        "{said}"
    );
    assert!(difference(&one, &one) < 1e-12 && difference(&one, &two) > 0.1);
}

#[test]
fn combined_adapters_add_up() {
    let temp = tempfile::tempdir().unwrap();
    let (one, two) = (
        golden("several/combined/one"),
        golden("several/combined/two"),
    );
    let folder = |name: &str| temp.path().join(name);
    let adapters = [
        format!("{}=0.7", one.display()),
        format!("{}=-1.25", two.display()),
    ];
    for method in ["linear", "cat", "svd", "ties", "dare_linear"] {
        let out = folder(method);
        let given = [
            "combine",
            "--method",
            method,
            "--density",
            "0.5",
            "--out",
            text(&out),
        ];
        let said = lora(&[&given[..], &[&adapters[0], &adapters[1]]].concat()).unwrap();
        assert!(said.contains("Wrote "), "{said}");
    }
    let said = lora(&["diff", text(&folder("linear")), text(&folder("cat"))]).unwrap();
    let cosines = said
        .lines()
        .skip(1)
        .filter_map(|row| row.split_whitespace().nth(7));
    assert!(cosines.take(1).all(|cosine| cosine == "1.0000"), "{said}");

    // Taking away what was added gives the other back.
    let back = folder("back");
    let sum = format!("{}=1", folder("cat").display());
    let two = format!("{}=1.25", two.display());
    lora(&["combine", "--out", text(&back), &sum, &two]).unwrap();
    let scaled = folder("scaled");
    lora(&[
        "combine",
        "--out",
        text(&scaled),
        &format!("{}=0.7", one.display()),
    ])
    .unwrap();
    assert!(difference(&back, &scaled) < 1e-5);
}

#[test]
fn merge_says_what_became_of_every_file() {
    let temp = tempfile::tempdir().unwrap();
    let (base, out) = (golden("llama/untied"), temp.path().join("merged"));
    let qv = golden("llama/untied/qv");
    let said = lora(&[
        "merge",
        "--base",
        text(&base),
        "--out",
        text(&out),
        text(&qv),
    ])
    .unwrap();
    assert_eq!(
        said,
        format!(
            "model.safetensors: 4 tensors changed\ncopied: config.json\nleft out: qv, seven\nWrote {}\n",
            out.display()
        )
    );
    let again = temp.path().join("again");
    let error = lora(&[
        "merge",
        "--base",
        text(&base),
        "--out",
        text(&again),
        "--replace-prefix",
        "model=x",
        text(&qv),
    ]);
    let error = error.unwrap_err();
    assert!(
        error.contains("`x.layers.0.self_attn.q_proj.weight`") && !again.exists(),
        "{error}"
    );
}

#[test]
fn a_weight_goes_behind_the_folder() {
    let weighted = |text: &str| text.parse::<Weighted>();
    let at = |adapter: &str, weight| {
        Ok(Weighted {
            adapter: adapter.into(),
            weight,
        })
    };
    assert_eq!(weighted("a/b"), at("a/b", 1.0));
    assert_eq!(weighted("a=b=-0.5"), at("a=b", -0.5));
    assert_eq!(
        weighted("a=b").unwrap_err(),
        "`b` is no number; say ADAPTER=WEIGHT"
    );
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("lr=1");
    fs::create_dir(&folder).unwrap();
    assert_eq!(weighted(text(&folder)), at(text(&folder), 1.0));
}
