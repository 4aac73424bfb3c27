//! JPEG 2000 and High-Throughput JPEG 2000 (ISO 15444-1, 15444-15), with OpenJPEG.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};

use openjpeg_sys as ffi;

use super::{Decoded, Shape, Wish, broken, other_colors};
use crate::color::Space;
use crate::error::Result;

/// Most tiles; each costs the decoder memory before a single byte of it is read.
const MAX_TILES: u64 = 4096;

pub(super) fn decode(frame: &[u8], shape: Shape, wish: Wish, into: &mut Decoded) -> Result<()> {
    let size = image_size(frame)?;
    shape.check(size.rows, size.columns, size.components)?;
    shape.check_plausible(frame)?;
    let reading = &mut Reading { frame, at: 0 };
    let stream = Stream::new(reading)?;
    let codec = Codec::new(!frame.starts_with(b"\xFF\x4F"))?;
    let image = codec.decode(&stream)?;
    let components = image.components();
    let [first, ..] = components else {
        return Err(broken("the JPEG 2000 has no component"));
    };
    let (precision, signed) = (first.prec, first.sgnd != 0);
    let pixels = shape.rows as usize * shape.columns as usize;
    for component in components {
        if (component.h, component.w) != (shape.rows, shape.columns) || component.data.is_null() {
            return Err(broken("the JPEG 2000 has a component of another size"));
        }
        if (component.prec, component.sgnd) != (first.prec, first.sgnd) {
            return Err(broken(
                "the JPEG 2000 has components of different precision or sign",
            ));
        }
    }
    if !(1..=32).contains(&precision) || components.len() != shape.samples as usize {
        return Err(broken(format!("the JPEG 2000 has {precision} bits")));
    }
    let cells = into.prepare(shape.samples_of_frame()?, precision)?;
    let (low, high) = if signed {
        (-1_i64 << (precision - 1), (1_i64 << (precision - 1)) - 1)
    } else {
        (0, (1_i64 << precision) - 1)
    };
    for (k, component) in components.iter().enumerate() {
        // SAFETY: not null; OpenJPEG allocates w * h samples for a component, which is `pixels`.
        let values = unsafe { std::slice::from_raw_parts(component.data, pixels) };
        let step = components.len();
        match precision {
            0..=8 => store::<1>(values, cells, k, step, low, high),
            9..=16 => store::<2>(values, cells, k, step, low, high),
            _ => store::<4>(values, cells, k, step, low, high),
        }
    }
    (into.signed, into.knows_sign) = (signed, true);
    if size.is_transformed && components.len() == 3 {
        // The decoder undoes the transform of the codestream.
        into.space = Space::Rgb;
        into.note = (wish.space == Space::Ybr).then(|| other_colors(Space::Rgb));
    }
    Ok(())
}

/// Values of one component to every `step`-th cell, from cell `at`; clamped, since a lossy decoder
/// may leave the range.
fn store<const N: usize>(
    values: &[i32],
    cells: &mut [u8],
    at: usize,
    step: usize,
    low: i64,
    high: i64,
) {
    let (cells, _) = cells.as_chunks_mut::<N>();
    let write = |cell: &mut [u8; N], value: i32| {
        if N == 4 {
            let value = if low == 0 {
                i64::from(value.cast_unsigned())
            } else {
                i64::from(value)
            };
            cell.copy_from_slice(
                value
                    .clamp(low, high)
                    .to_le_bytes()
                    .get(..N)
                    .unwrap_or(&[0; N]),
            );
        } else {
            let value = value.clamp(low as i32, high as i32);
            cell.copy_from_slice(value.to_le_bytes().get(..N).unwrap_or(&[0; N]));
        }
    };
    if step == 1 {
        for (cell, value) in cells.iter_mut().zip(values) {
            write(cell, *value);
        }
    } else {
        for (cell, value) in cells.iter_mut().skip(at).step_by(step).zip(values) {
            write(cell, *value);
        }
    }
}

struct Size {
    rows: u32,
    columns: u32,
    components: u32,
    /// Its components are transformed (ISO 15444-1 annex G).
    is_transformed: bool,
}

/// What the SIZ marker of the codestream says (ISO 15444-1 A.5.1).
fn image_size(frame: &[u8]) -> Result<Size> {
    let damaged = || broken("the JPEG 2000 has no whole header");
    let at = if frame.starts_with(b"\xFF\x4F") {
        0
    } else {
        // In a JP2 file the codestream is in a box; its start is unmistakable.
        let start = frame
            .windows(4)
            .position(|bytes| bytes == b"\xFF\x4F\xFF\x51");
        start.ok_or_else(damaged)?
    };
    let siz = frame.get(at + 4..).ok_or_else(damaged)?;
    let word = |at: usize| -> Result<u32> {
        let bytes = siz.get(at..at + 4).ok_or_else(damaged)?;
        Ok(<[u8; 4]>::try_from(bytes).map_or(0, u32::from_be_bytes))
    };
    let (right, bottom, left, top) = (word(4)?, word(8)?, word(12)?, word(16)?);
    let (tile_width, tile_height, tile_left, tile_top) =
        (word(20)?, word(24)?, word(28)?, word(32)?);
    let components = word(36)? >> 16;
    let tiles = |end: u32, start: u32, size: u32| -> Option<u64> {
        Some(u64::from(end.checked_sub(start)?).div_ceil(u64::from(size).max(1)))
    };
    let tiles = tiles(right, tile_left, tile_width)
        .zip(tiles(bottom, tile_top, tile_height))
        .and_then(|(across, down)| across.checked_mul(down));
    if tiles.is_none_or(|tiles| tiles > MAX_TILES) {
        return Err(broken(format!(
            "expected at most {MAX_TILES} tiles in a JPEG 2000"
        )));
    }
    Ok(Size {
        rows: bottom.checked_sub(top).ok_or_else(damaged)?,
        columns: right.checked_sub(left).ok_or_else(damaged)?,
        components,
        is_transformed: is_transformed(siz).unwrap_or(false),
    })
}

/// What the COD marker after the SIZ, whose value is the start of `siz`, says (ISO 15444-1 A.6.1).
fn is_transformed(siz: &[u8]) -> Option<bool> {
    let half = |at: usize| -> Option<usize> {
        let bytes = siz.get(at..at + 2)?;
        Some(usize::from(u16::from_be_bytes(bytes.try_into().ok()?)))
    };
    let mut at = half(0)?;
    loop {
        match half(at)? {
            0xFF52 => return Some(*siz.get(at + 8)? == 1),
            // The first tile, before which it has to be.
            0xFF90 => return None,
            _ => at += 2 + half(at + 2)?,
        }
    }
}

/// Where OpenJPEG reads from.
struct Reading<'a> {
    frame: &'a [u8],
    at: usize,
}

/// OpenJPEG's sign for the end.
const END: usize = usize::MAX;

/// SAFETY: called by OpenJPEG with the `Reading` that the stream was made with, which outlives it,
/// and with room for `size` bytes at `into`.
unsafe extern "C" fn read(into: *mut c_void, size: usize, data: *mut c_void) -> usize {
    // SAFETY: as above.
    let reading = unsafe { &mut *data.cast::<Reading<'_>>() };
    let rest = reading.frame.get(reading.at..).unwrap_or_default();
    let count = rest.len().min(size);
    if count == 0 {
        return END;
    }
    // SAFETY: both are `count` bytes long, and a frame is not OpenJPEG's own buffer.
    unsafe { ptr::copy_nonoverlapping(rest.as_ptr(), into.cast(), count) };
    reading.at += count;
    count
}

/// SAFETY: as [`read`].
unsafe extern "C" fn skip(size: i64, data: *mut c_void) -> i64 {
    // SAFETY: as above.
    let reading = unsafe { &mut *data.cast::<Reading<'_>>() };
    let left = reading.frame.len().saturating_sub(reading.at);
    let count = usize::try_from(size).unwrap_or(0).min(left);
    if count == 0 {
        return -1;
    }
    reading.at += count;
    count as i64
}

/// SAFETY: as [`read`].
unsafe extern "C" fn seek(at: i64, data: *mut c_void) -> i32 {
    // SAFETY: as above.
    let reading = unsafe { &mut *data.cast::<Reading<'_>>() };
    match usize::try_from(at) {
        Ok(at) if at <= reading.frame.len() => {
            reading.at = at;
            1
        }
        _ => 0,
    }
}

struct Stream<'a, 'b> {
    handle: NonNull<ffi::opj_stream_t>,
    _reading: std::marker::PhantomData<&'b mut Reading<'a>>,
}

impl<'a, 'b> Stream<'a, 'b> {
    fn new(reading: &'b mut Reading<'a>) -> Result<Self> {
        let length = reading.frame.len();
        // SAFETY: takes numbers; a null result is handled.
        let handle = NonNull::new(unsafe { ffi::opj_stream_create(length.max(1), 1) })
            .ok_or_else(|| broken("no memory for a JPEG 2000 decoder"))?;
        // SAFETY: the handle is live; the functions fit what they are set for; the data outlives
        // the stream by the lifetime of this struct, and nothing has to free it.
        unsafe {
            ffi::opj_stream_set_read_function(handle.as_ptr(), Some(read));
            ffi::opj_stream_set_skip_function(handle.as_ptr(), Some(skip));
            ffi::opj_stream_set_seek_function(handle.as_ptr(), Some(seek));
            ffi::opj_stream_set_user_data(handle.as_ptr(), ptr::from_mut(reading).cast(), None);
            ffi::opj_stream_set_user_data_length(handle.as_ptr(), length as u64);
        }
        Ok(Stream {
            handle,
            _reading: std::marker::PhantomData,
        })
    }
}

impl Drop for Stream<'_, '_> {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used again.
        unsafe { ffi::opj_stream_destroy(self.handle.as_ptr()) };
    }
}

struct Codec {
    handle: NonNull<ffi::opj_codec_t>,
}

impl Codec {
    fn new(is_boxed: bool) -> Result<Self> {
        let format = if is_boxed {
            ffi::CODEC_FORMAT::OPJ_CODEC_JP2
        } else {
            ffi::CODEC_FORMAT::OPJ_CODEC_J2K
        };
        // SAFETY: takes a number; a null result is handled.
        let handle = NonNull::new(unsafe { ffi::opj_create_decompress(format) }.cast())
            .ok_or_else(|| broken("no memory for a JPEG 2000 decoder"))?;
        let codec = Codec { handle };
        let mut parameters = MaybeUninit::<ffi::opj_dparameters_t>::zeroed();
        // SAFETY: the function sets every field; zero is valid for each in any case.
        let mut parameters = unsafe {
            ffi::opj_set_default_decoder_parameters(parameters.as_mut_ptr());
            parameters.assume_init()
        };
        // The colours of a JP2 are told by DICOM.
        parameters.flags |= ffi::OPJ_DPARAMETERS_IGNORE_PCLR_CMAP_CDEF_FLAG;
        // SAFETY: both are live; the parameters are copied.
        match unsafe { ffi::opj_setup_decoder(codec.raw(), &raw mut parameters) } {
            0 => Err(broken("the JPEG 2000 decoder cannot be set up")),
            _ => Ok(codec),
        }
    }

    fn raw(&self) -> *mut ffi::opj_codec_t {
        self.handle.as_ptr().cast()
    }

    fn decode(&self, stream: &Stream<'_, '_>) -> Result<Image> {
        let stream = stream.handle.as_ptr();
        let mut image = ptr::null_mut();
        // SAFETY: all handles are live; `image` is written to.
        let header = unsafe { ffi::opj_read_header(stream, self.raw(), &raw mut image) };
        let image = NonNull::new(image).map(|handle| Image { handle });
        let image = image.filter(|_| header != 0);
        let image = image.ok_or_else(|| broken("the JPEG 2000 has a damaged header"))?;
        // SAFETY: all handles are live.
        let decoded = unsafe {
            ffi::opj_decode(self.raw(), stream, image.handle.as_ptr()) != 0
                && ffi::opj_end_decompress(self.raw(), stream) != 0
        };
        if decoded {
            Ok(image)
        } else {
            Err(broken("the JPEG 2000 is damaged or cut off"))
        }
    }
}

impl Drop for Codec {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used again.
        unsafe { ffi::opj_destroy_codec(self.raw()) };
    }
}

struct Image {
    handle: NonNull<ffi::opj_image_t>,
}

impl Image {
    fn components(&self) -> &[ffi::opj_image_comp_t] {
        // SAFETY: the handle is live, and OpenJPEG made it with `numcomps` components.
        unsafe {
            let image = self.handle.as_ref();
            if image.comps.is_null() {
                return &[];
            }
            std::slice::from_raw_parts(image.comps, image.numcomps as usize)
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used again.
        unsafe { ffi::opj_image_destroy(self.handle.as_ptr()) };
    }
}
