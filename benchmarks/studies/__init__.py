"""Studies behind pages of docs/, to be run again with other assumptions or another teacher."""
