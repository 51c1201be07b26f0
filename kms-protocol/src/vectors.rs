//! Inputs that several frozen vectors share (kms-protocol §13). The key is a published test key.

/// Scalar of the root P-256 test key.
pub(crate) const ROOT_SCALAR: &str = "f57527cea4ab7ffb49af99b158cdc0e3ec06398f528349ea236b7d2afe19cec1";
/// Its SubjectPublicKeyInfo.
pub(crate) const ROOT_SPKI: &str = "3059301306072a8648ce3d020106082a8648ce3d0301070342000491f50522407ce29dce3ed7d31a15d80c1c42f13a23552d2b33a0ce09ee11e47bce95936f3e7f80d195f879e28e1b144ef37ac9ab8e36a690cbf930b775897b27";
/// Public key of the K256 root test key, 32 times 0x42.
pub(crate) const K256_ROOT_PUBLIC: &str =
    "0324653eac434488002cc06bbfb7f10fe18991e35f9fe4302dbea6d2353dc0ab1c";

/// Bytes from hex, white space ignored.
pub(crate) fn bytes(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    hex::decode(digits).expect("vectors are hex")
}
