//! The ELF kernel inside a bzImage.

use anyhow::{Context, Result, bail};
use std::io::Read;

/// Unpacks the ELF kernel of a bzImage (Documentation/arch/x86/boot.rst: `payload_offset` at 0x248, from the end of
/// the setup sectors, which 0x1f1 counts; `payload_length` at 0x24c).
pub fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Option<usize> {
        Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        bail!("The kernel is no bzImage");
    }
    let setup = (image[0x1f1] as usize).max(1) + 1;
    let (offset, length) = word(0x248).zip(word(0x24c)).context("The bzImage has no header")?;
    let start = setup * 512 + offset;
    let packed = image.get(start..start + length).context("The payload of the bzImage is cut short")?;
    let mut kernel = Vec::new();
    let mut unpacker: Box<dyn Read> = match packed {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Box::new(lzma_rust2::XzReader::new(packed, true)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(ruzstd::decoding::StreamingDecoder::new(packed)?),
        [0x1f, 0x8b, ..] => Box::new(flate2::read::GzDecoder::new(packed)),
        _ => bail!("The kernel is compressed in a way that is not known here"),
    };
    // The length of the kernel follows the stream: an error after all of it is about those bytes.
    let result = unpacker.read_to_end(&mut kernel);
    if !kernel.starts_with(b"\x7fELF") {
        result.context("Cannot unpack the kernel")?;
        bail!("The payload of the bzImage is no ELF file");
    }
    Ok(kernel)
}
