//! JPEG-LS, lossless and near-lossless (ISO 14495-1), with CharLS.

use std::ffi::c_void;
use std::ptr::NonNull;

use charls_sys as ffi;

use super::jpeg::start_of_frame;
use super::{Decoded, Shape, broken};
use crate::error::Result;

/// The marker at the end of an image. Without it CharLS reads on after the last byte, for seconds.
const END: &[u8] = b"\xFF\xD9";
/// Padding that may follow it.
const NEAR_THE_END: usize = 64;

pub(super) fn decode(frame: &[u8], shape: Shape, into: &mut Decoded) -> Result<()> {
    let start = start_of_frame(frame)?;
    shape.check(start.rows, start.columns, start.components)?;
    // A row has at least a bit.
    let row = shape.columns as usize * shape.samples as usize;
    shape.check_held(frame, row.saturating_mul(8))?;
    let ended;
    let frame = if frame
        .windows(2)
        .rev()
        .take(NEAR_THE_END)
        .any(|two| two == END)
    {
        frame
    } else {
        ended = [frame, END].concat();
        ended.as_slice()
    };
    let decoder = Decoder::new(frame)?;
    let info = decoder.frame_info()?;
    // What the decoder will write is decided by its own reading of the header.
    let components = u32::try_from(info.component_count).unwrap_or(0);
    shape.check(info.height, info.width, components)?;
    let precision = u32::try_from(info.bits_per_sample).unwrap_or(0);
    if !(2..=16).contains(&precision) {
        return Err(broken(format!(
            "expected 2 to 16 bits in a JPEG-LS, found {precision}"
        )));
    }
    let mut scratch = std::mem::take(&mut into.scratch);
    let samples = shape.samples as usize;
    let cells = into.prepare(shape.samples_of_frame()?, precision)?;
    let outcome = if start.is_planar {
        let cell = if precision > 8 { 2 } else { 1 };
        scratch.resize(cells.len(), 1).and_then(|planes| {
            decoder.decode(planes)?;
            interleave(planes, cells, samples, cell);
            Ok(())
        })
    } else {
        decoder.decode(cells)
    };
    into.scratch = scratch;
    outcome
}

/// Planes one after the other become samples one after the other.
fn interleave(planes: &[u8], cells: &mut [u8], samples: usize, cell: usize) {
    let plane = planes.len() / samples;
    for (k, pixel) in cells.chunks_exact_mut(samples * cell).enumerate() {
        for (sample, place) in pixel.chunks_exact_mut(cell).enumerate() {
            let at = sample * plane + k * cell;
            place.copy_from_slice(planes.get(at..at + cell).unwrap_or(&[0, 0]));
        }
    }
}

/// A decoder that has read the header of a codestream.
struct Decoder<'a> {
    handle: NonNull<ffi::charls_jpegls_decoder>,
    // The decoder reads from here until it is dropped.
    _frame: &'a [u8],
}

impl<'a> Decoder<'a> {
    fn new(frame: &'a [u8]) -> Result<Self> {
        // SAFETY: takes nothing; a null result is handled.
        let handle = NonNull::new(unsafe { ffi::charls_jpegls_decoder_create() })
            .ok_or_else(|| broken("no memory for a JPEG-LS decoder"))?;
        let decoder = Decoder {
            handle,
            _frame: frame,
        };
        let pointer = frame.as_ptr().cast::<c_void>();
        // SAFETY: the handle is live; the frame outlives the decoder.
        let found = unsafe {
            ffi::charls_jpegls_decoder_set_source_buffer(handle.as_ptr(), pointer, frame.len())
        };
        checked(found)?;
        // SAFETY: the handle is live and has its source.
        checked(unsafe { ffi::charls_jpegls_decoder_read_header(handle.as_ptr()) })?;
        Ok(decoder)
    }

    fn frame_info(&self) -> Result<ffi::charls_frame_info> {
        let mut info = ffi::charls_frame_info {
            width: 0,
            height: 0,
            bits_per_sample: 0,
            component_count: 0,
        };
        // SAFETY: the handle is live and has read its header; `info` is written to only.
        let found = unsafe {
            ffi::charls_jpegls_decoder_get_frame_info(self.handle.as_ptr(), &raw mut info)
        };
        checked(found)?;
        Ok(info)
    }

    fn decode(&self, into: &mut [u8]) -> Result<()> {
        let pointer = into.as_mut_ptr().cast::<c_void>();
        // SAFETY: the handle is live and has read its header; the decoder writes at most
        // `into.len()` bytes.
        checked(unsafe {
            ffi::charls_jpegls_decoder_decode_to_buffer(
                self.handle.as_ptr(),
                pointer,
                into.len(),
                0,
            )
        })
    }
}

impl Drop for Decoder<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used again.
        unsafe { ffi::charls_jpegls_decoder_destroy(self.handle.as_ptr()) };
    }
}

fn checked(found: ffi::charls_jpegls_errc) -> Result<()> {
    if found == ffi::charls_jpegls_errc_success {
        return Ok(());
    }
    // SAFETY: the function returns a text that lives as long as the program, for any number.
    let text = unsafe { std::ffi::CStr::from_ptr(ffi::charls_get_error_message(found)) };
    Err(broken(format!(
        "the JPEG-LS is damaged: {}",
        text.to_string_lossy()
    )))
}
