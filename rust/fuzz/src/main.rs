//! One input after the other through one target of `rust/core/tests/hostile/targets.rs`.
//!
//! `FUZZ_TARGET` names the target. Memory is that of all of the process, the C and C++ codecs
//! included.

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

#[path = "../../core/tests/hostile/targets.rs"]
mod targets;

unsafe extern "C" {
    safe fn meter_start();
    safe fn meter_peak() -> usize;
}

fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<targets::Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target");
        targets::find(&name).expect("FUZZ_TARGET is one of targets::TARGETS")
    });
    targets::check(*target, data, || meter_start(), || meter_peak());
});
