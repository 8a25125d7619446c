//! The kernels' sources.

/// A file of `metal/`.
#[derive(Debug, Clone, Copy)]
pub struct File {
    /// Its name.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! files {
    ($($name:literal),*) => {
        &[$(File { name: $name, text: include_str!(concat!("../../metal/", $name)) }),*]
    };
}

/// What the kernels include.
pub const HEADERS: &[File] = files!(
    "args.h",
    "fp4.h",
    "rows.h",
    "dense.h",
    "merge.h",
    "cache.h",
    "norm_rope.h",
    "paged.h"
);

/// The kernels, a family of ops a file.
pub const KERNELS: &[File] = files!(
    "linear.metal",
    "dense.metal",
    "merged.metal",
    "norm_rope.metal",
    "append.metal",
    "router.metal",
    "moe.metal",
    "paged_latents.metal",
    "paged_heads.metal",
    "paged_rows.metal"
);

/// All of it as one text, which needs no files beside it: headers first, once.
pub fn library() -> String {
    let mut text = String::new();
    for file in HEADERS.iter().chain(KERNELS) {
        text.push_str(&format!("#line 1 \"{}\"\n", file.name));
        for line in file.text.lines() {
            let ours = line.starts_with("#include \"") || line.trim() == "#pragma once";
            text.push_str(if ours { "" } else { line });
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_whole() {
        let text = library();
        assert!(!text.contains("#include \""), "{text}");
        for file in HEADERS.iter().chain(KERNELS) {
            assert!(text.contains(&format!("#line 1 \"{}\"", file.name)));
        }
        // Every header that is included is one of them.
        for file in KERNELS.iter().chain(HEADERS) {
            for line in file.text.lines().filter(|line| line.starts_with("#include \"")) {
                let name = line.split('"').nth(1).unwrap();
                assert!(HEADERS.iter().any(|header| header.name == name), "{name}");
            }
        }
        let on_disk = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/metal")).unwrap();
        for entry in on_disk {
            let name = entry.unwrap().file_name();
            if name == "README.md" {
                continue;
            }
            let known = HEADERS.iter().chain(KERNELS).any(|file| name == file.name);
            assert!(known, "{} is not part of the library", name.display());
        }
    }
}
