use lora_core::targets;

struct Plain;

fn main() {
    let _ = targets!(Plain: ["*.q_proj"]);
    let _ = targets!(Missing: ["*.q_proj"]);
}
