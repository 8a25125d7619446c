//! The beginnings of files of weights, as far as their headers go.

use super::{Client, Failure, transient};
use crate::checkpoint::files::GGUF;
use crate::checkpoint::gguf::reach_of_header;
use crate::checkpoint::hub::PlannedFile;
use crate::{Error, Result};
use std::io::Read;
use ureq::http::Method;

/// The largest header that a safetensors file may have, as its format says.
const HEADER_LIMIT: u64 = 100_000_000;
/// The largest header of a GGUF file that is fetched, for which the format has no limit: a vocabulary of 150,000 tokens takes
/// 10 MB.
const GGUF_HEADER_LIMIT: u64 = 256 << 20;
/// What is fetched of a GGUF file before its header is looked at, to see whether more is needed.
const GGUF_STEP: u64 = 1 << 20;

impl Client<'_> {
    /// The beginning of a file of weights, in which its header ends: of safetensors no more than that; of GGUF, which does not
    /// say how long it is, less than twice as much, but for the first step. What follows stays where it is.
    pub(in crate::checkpoint::hub) fn beginning(
        &self,
        commit: &str,
        file: &PlannedFile,
    ) -> Result<Vec<u8>, Failure> {
        let url = self.url(commit, &file.name);
        self.patiently(|| {
            let response = self.send(Method::GET, &url, None)?;
            let body = self.accept(response, Some(&file.name))?.into_body();
            let (mut body, mut bytes) = (body.into_reader(), Vec::new());
            if file.name.ends_with(GGUF) {
                self.gguf(file, &mut body, &mut bytes)?;
            } else {
                let mut length = [0; 8];
                body.read_exact(&mut length).map_err(transient)?;
                bytes.extend(length);
                let header = self.header_length(file, u64::from_le_bytes(length))?;
                read_up_to(8 + header, &mut body, &mut bytes)?;
            }
            Ok(bytes)
        })
    }

    /// The length of a safetensors file's header, as `told` at its beginning.
    fn header_length(&self, file: &PlannedFile, told: u64) -> Result<u64> {
        if told <= file.size.saturating_sub(8) && told <= HEADER_LIMIT {
            return Ok(told);
        }
        let problem = format!(
            "`{}`, of {} bytes, begins with a header of {told}",
            file.name, file.size
        );
        let remedy = "it is not a safetensors file; the repository is at fault, or the proxy";
        Err(self.repo.error(problem, remedy))
    }

    /// Reads a GGUF file's header, twice as many bytes each time until it ends in them.
    fn gguf(&self, file: &PlannedFile, body: &mut impl Read, bytes: &mut Vec<u8>) -> Result<(), Failure> {
        let mut wanted = GGUF_STEP;
        loop {
            read_up_to(wanted.min(file.size), body, bytes)?;
            let (held, reach) = (bytes.len() as u64, reach_of_header(bytes) as u64);
            // What goes on beyond the end of the file is refused when it is read, as of any other file.
            if reach <= held || reach > file.size {
                return Ok(());
            }
            if reach > GGUF_HEADER_LIMIT {
                return Err(self.too_long(file, reach).into());
            }
            wanted = reach.max(2 * held).min(GGUF_HEADER_LIMIT);
        }
    }

    fn too_long(&self, file: &PlannedFile, reach: u64) -> Error {
        let problem = format!(
            "the header of `{}` is of {reach} bytes or more; at most {GGUF_HEADER_LIMIT} are fetched to look at it",
            file.name
        );
        let name = self.repo.name();
        let remedy = format!("fetch the file, as `mmfp4 generate -m {name}` does, and look at it then");
        self.repo.error(problem, remedy)
    }
}

/// Reads until `bytes` are so many.
fn read_up_to(len: u64, body: &mut impl Read, bytes: &mut Vec<u8>) -> Result<(), Failure> {
    let more = len.saturating_sub(bytes.len() as u64);
    let read = body.take(more).read_to_end(bytes).map_err(transient)?;
    match read as u64 == more {
        true => Ok(()),
        false => Err(transient("the connection was closed early")),
    }
}
