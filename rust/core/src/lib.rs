//! Header scanner and pixel kernels of dicomnode.
//!
//! The problem: a node must know a dozen attributes of every object that arrives, and must turn
//! hundreds of native images into one array, without decoding what nobody asked for and without
//! trusting a single number that came from the network. This crate does both on paths and slices
//! that it is given; it knows no Python.
//!
//! | module | job |
//! |---|---|
//! | [`scan`] | where the top-level elements of one object lie |
//! | [`image`] | the attributes that stacking needs, out of a scanned header |
//! | [`folder`] | which files are objects |
//! | [`pixels`] | stored bytes to values of an output type |
//! | [`stack`] | many images into one array, in parallel |
//! | `functional` | what an enhanced object says of each frame |
//! | [`encapsulated`] | which fragments make up which frame |
//! | [`codec`] | one compressed frame to its samples |
//! | [`color`] | samples of colour, one pixel after the other, in RGB |
//! | [`digest`] | how content is known again |
//! | [`hashing`] | digests of several images at once |
//! | [`names`] | what an ordinary image is called |
//! | [`receive`] | the bytes of an association to whole C-STORE requests |
//! | [`journal`] | small images that are flushed together |
//! | [`source`] | a file or bytes in memory |
//! | [`error`] | the one error type |

pub mod bytes;
pub mod codec;
pub mod color;
pub mod digest;
pub mod encapsulated;
pub mod error;
pub mod extent;
pub mod folder;
mod functional;
pub mod hashing;
pub mod image;
pub mod incoming;
pub mod journal;
pub mod meta;
pub mod names;
pub mod pixels;
pub mod receive;
pub mod scan;
mod sha256;
pub mod source;
pub mod stack;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
