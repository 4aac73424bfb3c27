//! `codecs` and `jpeg_has_simd`.

use dicomnode_core::codec::{SYNTAXES, jpeg_has_simd as has_simd};
use pyo3::prelude::*;

/// A row of the table: UID, name, decoder, its crate and version, its licence.
type Row = (
    &'static str,
    &'static str,
    &'static str,
    String,
    &'static str,
);

/// Every encapsulated transfer syntax: UID, name, decoder, its crate and version, its licence.
///
/// The last three are empty for a syntax that is not decoded.
#[pyfunction]
pub fn codecs() -> Vec<Row> {
    SYNTAXES
        .iter()
        .map(|(uid, name, codec)| match codec {
            None => (*uid, *name, "", String::new(), ""),
            Some(codec) => {
                let (decoder, licence, from) = codec.origin();
                (*uid, *name, decoder, version_of(from), licence)
            }
        })
        .collect()
}

/// Whether the JPEG decoder was built with its SIMD code.
#[pyfunction]
pub fn jpeg_has_simd() -> bool {
    has_simd()
}

/// A crate that this module was built with, and its version; ours for the empty name.
fn version_of(from: &str) -> String {
    if from.is_empty() {
        return env!("CARGO_PKG_VERSION").to_owned();
    }
    let start = format!("name = \"{from}\"\nversion = \"");
    let version = include_str!("../../../Cargo.lock")
        .split(&start)
        .nth(1)
        .and_then(|rest| rest.split('"').next());
    format!("{from} {}", version.unwrap_or_default())
}
