//! Builds `hooks.c`, which must not be instrumented itself.

fn main() {
    println!("cargo:rerun-if-changed=src/hooks.c");
    cc::Build::new()
        .file("src/hooks.c")
        .flag("-fno-sanitize=all")
        .flag("-fno-sanitize-coverage=trace-pc,trace-cmp")
        .compile("hooks");
    // rustc forbids gcc to add the library by itself.
    println!("cargo:rustc-link-arg=-fsanitize=address");
    println!("cargo:rustc-link-arg=-Wl,--whole-archive,-l:libasan.a,--no-whole-archive");
    println!("cargo:rustc-link-arg=-Wl,--wrap=__sanitizer_cov_trace_pc");
}
