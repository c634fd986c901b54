"""The interfaces of older systems, for services that migrate from them: handler pairs, jobs, headers of PikaBus."""
