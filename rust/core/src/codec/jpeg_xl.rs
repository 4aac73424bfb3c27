//! JPEG XL (ISO 18181), with jxl.

use jxl::api::{
    Endianness, Event, JxlBitDepth, JxlColorType, JxlDataFormat, JxlDecoder, JxlDecoderOptions,
    JxlOutputBuffer, JxlPixelFormat, ProfileLevel,
};

use super::{Decoded, Shape, broken};
use crate::color::Space;
use crate::error::{Error, Result};

pub(super) fn decode(frame: &[u8], shape: Shape, into: &mut Decoded) -> Result<()> {
    let damaged = |error| broken(format!("the JPEG XL is damaged: {error}"));
    let cut_off = || broken("the JPEG XL is cut off");
    let mut options = JxlDecoderOptions::default();
    options.adjust_orientation = false;
    options.high_precision = true;
    options.max_profile_level = ProfileLevel::Main10;
    // The decoder counts whole groups of pixels, and channels that a grey image does not have.
    options.sample_limit = Some(8 * shape.samples_of_frame()? + (1 << 20));
    let mut decoder = JxlDecoder::new(options);
    let mut input = frame;
    if decoder.process(&mut input, None, None).map_err(damaged)? != Event::BasicInfo {
        return Err(cut_off());
    }
    let info = decoder.basic_info().ok_or_else(cut_off)?;
    let (columns, rows) = info.size;
    let extra = info.extra_channels.len();
    let precision = match info.bit_depth {
        JxlBitDepth::Int { bits_per_sample } => bits_per_sample,
        JxlBitDepth::Float { .. } => {
            return Err(Error::unsupported(
                "expected a JPEG XL of integers, found floats",
            ));
        }
    };
    if !(1..=16).contains(&precision) {
        let message = format!("expected 1 to 16 bits in a JPEG XL, found {precision}");
        return Err(Error::unsupported(message));
    }
    let is_grey = decoder
        .embedded_color_profile()
        .is_some_and(|profile| profile.channels() == 1);
    let found = if is_grey { 1 } else { 3 };
    into.space = Space::Rgb;
    let size = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    shape.check(size(rows), size(columns), found)?;
    shape.check_plausible(frame)?;
    let bit_depth = u8::try_from(precision).unwrap_or(16);
    let format = if precision > 8 {
        let endianness = Endianness::LittleEndian;
        JxlDataFormat::U16 {
            endianness,
            bit_depth,
        }
    } else {
        JxlDataFormat::U8 { bit_depth }
    };
    let pixels = JxlPixelFormat {
        color_type: if is_grey {
            JxlColorType::Grayscale
        } else {
            JxlColorType::Rgb
        },
        color_data_format: Some(format),
        extra_channel_format: vec![None; extra],
    };
    decoder.set_pixel_format(pixels).map_err(damaged)?;
    let cells = into.prepare(shape.samples_of_frame()?, precision)?;
    let row = cells.len() / rows.max(1);
    let mut buffers = [JxlOutputBuffer::new(cells, rows, row)];
    loop {
        match decoder
            .process(&mut input, Some(&mut buffers), None)
            .map_err(damaged)?
        {
            Event::FrameComplete {
                has_more_frames: true,
            } => {
                return Err(Error::unsupported(
                    "expected one image in a JPEG XL, found several",
                ));
            }
            Event::FrameComplete { .. } | Event::Complete => return Ok(()),
            Event::NeedMoreInput { .. } => return Err(cut_off()),
            Event::BasicInfo | Event::FrameHeader => {}
        }
    }
}
