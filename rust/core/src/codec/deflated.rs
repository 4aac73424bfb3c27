//! Deflated Image Frame Compression (PS3.5 annex A.4.12): each frame is one raw deflate stream.

use flate2::{Decompress, FlushDecompress};

use super::{Decoded, Shape, broken};
use crate::error::Result;

pub(super) fn decode(frame: &[u8], shape: Shape, into: &mut Decoded) -> Result<()> {
    // Deflate cannot reach more than 1032 times.
    shape.check_held(frame, 1032)?;
    let cells = into.prepare_cells(shape)?;
    let mut inflate = Decompress::new(false);
    let damaged = |error| broken(format!("the deflated frame is damaged: {error}"));
    inflate
        .decompress(frame, cells, FlushDecompress::Finish)
        .map_err(damaged)?;
    let found = inflate.total_out();
    if found != cells.len() as u64 {
        return Err(broken(format!(
            "expected a frame of {} bytes, found {found}",
            cells.len()
        )));
    }
    Ok(())
}
