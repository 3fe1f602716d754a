//! Which paths a pattern names: the cases of NeMo AutoModel and of Hugging Face PEFT.

use lora_core::Glob;

fn names(pattern: &str, path: &str) -> bool {
    Glob::new(pattern).is_some_and(|glob| glob.matches(path))
}

/// A case of NeMo's matcher.
struct Case {
    pattern: &'static str,
    path: &'static str,
    /// What NeMo AutoModel answers: its first release with LoRA, and its latest.
    nemo: [bool; 2],
    ours: bool,
}

const fn case(pattern: &'static str, path: &'static str, nemo: [bool; 2], ours: bool) -> Case {
    Case {
        pattern,
        path,
        nemo,
        ours,
    }
}

const T: bool = true;
const F: bool = false;

/// Where ours differs, the line above says why.
const NEMO_CASES: &[Case] = &[
    case(
        "*.layers.0.*.linear_qkv",
        "decoder.layers.0.self_attention.linear_qkv",
        [T, T],
        T,
    ),
    case(
        "*.layers.0.*.linear_qkv",
        "decoder.layers.1.self_attention.linear_qkv",
        [F, F],
        F,
    ),
    case(
        "*.layers.1.*.q_proj",
        "model.layers.1.self_attn.q_proj",
        [T, T],
        T,
    ),
    // A number means itself: layer 1 is not layer 10.
    case(
        "*.layers.1.*.q_proj",
        "model.layers.10.self_attn.q_proj",
        [T, T],
        F,
    ),
    // A star takes no dot with it: what stands beside it has to be there.
    case("*.layers.1.*.q_proj", "model.layers.1.q_proj", [F, T], F),
    case("*.b.*", "a.b", [F, T], F),
    case("*.b.*", "a.b.c", [T, T], T),
    case("*.*.*", "a.b.c", [T, T], T),
    case("*", "", [T, T], T),
    case(".*", "", [F, T], F),
    case("*", "layers.0.q_proj", [T, T], T),
    case("*.lm_head", "lm_head", [F, F], F),
    case("*lm_head", "lm_head", [T, T], T),
    // A dot means itself.
    case("*.proj", "xyproj", [T, T], F),
    case("*.proj", "xy.proj", [T, T], T),
    // So does every other character; a regular expression is asked for with `re:`.
    case("*[qk]_proj", "layers.0.k_proj", [T, T], F),
    case("*.(q|v)_proj", "layers.0.v_proj", [T, T], F),
    case("*_proj", "a.q_projX", [F, F], F),
    case("*_proj", "a.q_proj", [T, T], T),
    case("q_proj", "q_proj", [T, T], T),
    // A bare name means the last segment, as in PEFT.
    case("q_proj", "layers.0.self_attn.q_proj", [F, F], T),
    case("layers.0.q_proj", "layers.0.q_proj", [T, T], T),
    case("layers.0.q_proj", "model.layers.0.q_proj", [F, F], F),
];

#[test]
fn nemo_cases() {
    for case in NEMO_CASES {
        assert_eq!(
            names(case.pattern, case.path),
            case.ours,
            "`{}` and `{}` (NeMo AutoModel: {:?})",
            case.pattern,
            case.path,
            case.nemo,
        );
    }
}

/// NeMo's rules, so that the column beside ours is computed and not remembered.
#[test]
fn nemo_answers_are_those_of_its_rules() {
    let anchored = |body: String| regex::Regex::new(&format!("^(?:{body})$")).unwrap();
    for case in NEMO_CASES {
        let seed = anchored(case.pattern.replace('*', "(.*)"));
        let mut head = String::new();
        for c in case.pattern.chars() {
            if c == '*' && !head.ends_with('.') {
                head.push('.');
            }
            head.push(c);
        }
        let head = anchored(head.replace(".*", "(.*)"));
        let exact = case.pattern == case.path;
        assert_eq!(
            [&seed, &head].map(|rule| exact || rule.is_match(case.path)),
            case.nemo,
            "`{}` and `{}`",
            case.pattern,
            case.path,
        );
    }
}

/// PEFT's rule for a list of names: the path is the name, or ends with a dot and the name.
#[test]
fn peft_names_mean_the_same() {
    let paths = [
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.xq_proj",
        "model.layers.0.self_attn.q_proj_norm",
        "q_proj.dense",
        "model.layers.0.mlp.experts.7",
        "lm_head",
    ];
    for name in ["q_proj", "proj", "lm_head", "dense", "7", "_proj"] {
        for path in paths {
            let peft = path == name || path.ends_with(&format!(".{name}"));
            assert_eq!(names(name, path), peft, "`{name}` and `{path}`");
        }
    }
}

/// In a list of PEFT a name may hold dots; here a pattern with a dot covers the whole path.
#[test]
fn a_dotted_name_needs_a_star_to_mean_the_end() {
    assert!(!names("self_attn.q_proj", "layers.0.self_attn.q_proj"));
    assert!(names("*.self_attn.q_proj", "layers.0.self_attn.q_proj"));
    assert!(names("*self_attn.q_proj", "self_attn.q_proj"));
}

#[test]
fn stars_may_follow_each_other_and_stand_for_nothing() {
    assert!(names("**.q_proj", "a.b.q_proj"));
    assert!(names("a***b", "ab"));
    assert!(names("a*", "a"));
    assert!(names("*a*", "a"));
    assert!(!names("*.*", "a"));
}

#[test]
fn other_scripts_are_compared_byte_by_byte() {
    assert!(names("*.größe", "a.größe"));
    assert!(names("größe", "a.größe"));
    assert!(!names("*.grö", "a.größe"));
}

#[test]
fn a_pattern_has_1_to_120_bytes() {
    assert!(Glob::new("").is_none());
    let long = "a".repeat(120);
    assert!(names(&long, &long));
    assert!(names(&long, &format!("b.{long}")));
    assert!(!names(&long, &format!("{long}a")));
    let starred = format!("*{}", &long[1..]);
    assert!(names(&starred, &long[1..]));
    assert!(!names(&starred, &long[2..]));
    assert!(Glob::new(&"a".repeat(121)).is_none());
}
