"""What training cost elsewhere: public sets, every arm on the one backbone, with intervals."""
