//! Tells the crate whether libjpeg-turbo was built with its SIMD code, which needs an assembler.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=PATH");
    let is_x86 = std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch.starts_with("x86"));
    let has = |name: &str| Command::new(name).arg("-v").output().is_ok();
    let is_fast = !is_x86 || has("nasm") || has("yasm");
    println!("cargo:rustc-env=DICOMNODE_JPEG_SIMD={}", u8::from(is_fast));
}
