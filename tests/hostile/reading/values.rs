//! Values that no writer means.

use super::random::Random;
use serde_json::{Value, json};

/// Numbers at the edges of what types hold and products bear, as a file may spell them.
pub const NUMBERS: [&str; 27] = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "63",
    "65",
    "4096",
    "4097",
    "65536",
    "1048576",
    "1048577",
    "2147483647",
    "2147483648",
    "4294967296",
    "1099511627776",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "0.5",
    "-0.0",
    "1e308",
    "1e-320",
];

/// The same as whole numbers of 64 bits.
pub const SIZES: [u64; 20] = [
    0,
    1,
    2,
    3,
    7,
    31,
    33,
    63,
    65,
    4096,
    1 << 20,
    (1 << 20) + 1,
    1 << 31,
    1 << 32,
    1 << 40,
    1 << 53,
    1 << 62,
    1 << 63,
    u64::MAX - 31,
    u64::MAX,
];

/// A size that is most likely wrong: one of the above, or one near the right one.
pub fn size(right: u64, random: &mut Random<'_>) -> u64 {
    match random.below(4) {
        0 => right.wrapping_add(1 + random.below(3) as u64),
        1 => right.wrapping_sub(1 + random.below(3) as u64),
        2 => right.wrapping_mul(2),
        _ => *random.pick(&SIZES),
    }
}

/// Something that is not what was expected.
pub fn value(random: &mut Random<'_>) -> Value {
    match random.below(16) {
        0 => Value::Null,
        1 => json!(random.once_in(2)),
        2 => json!([]),
        3 => json!({}),
        4 => json!([1, [2, [3, {"a": [4]}]]]),
        5 => json!({"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}),
        6 => json!(text(random)),
        7 => json!(*random.pick(&SIZES)),
        8 => json!([random.pick(&SIZES), random.pick(&SIZES)]),
        _ => serde_json::from_str(random.pick::<&str>(&NUMBERS)).expect("each is a number"),
    }
}

/// A text that is not what was expected.
pub fn text(random: &mut Random<'_>) -> String {
    let known = [
        "",
        "0",
        "NaN",
        "-1",
        "null",
        "true",
        "dense",
        "BF16",
        "I64",
        "gptq",
        "mxfp4",
        "\u{0}",
        "..",
        "/",
        "ä\u{202e}",
        "{{",
        "{% for a in b %}",
        "model.safetensors",
        "config.json",
        "weight",
    ];
    match random.below(8) {
        0 => "a".repeat(random.below(20_000)),
        1 => (0..random.below(20)).map(|_| char::from(random.byte())).collect(),
        _ => random.pick(&known).to_string(),
    }
}

/// A file's name that leads astray.
pub fn path(random: &mut Random<'_>) -> String {
    const PARTS: [&str; 14] = [
        "..",
        ".",
        "",
        "a",
        "outside",
        "outside.safetensors",
        "/",
        "\\",
        "C:",
        "%2e%2e",
        "\u{0}",
        "~",
        "$HOME",
        " ",
    ];
    let separators = ["/", "/", "/", "\\", "//"];
    let mut path = String::new();
    for _ in 0..1 + random.below(4) {
        path += *random.pick(&PARTS);
        path += *random.pick(&separators);
    }
    match random.below(4) {
        0 => path,
        1 => path + "outside",
        _ => path + "outside.safetensors",
    }
}
