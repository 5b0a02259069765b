/* stack.hdf: three images of 5 x 4 pixels written by HDF5's own library with the types and spaces that EMAN2's files
 * have (read off files and the format's description on EMAN2's pages):
 *
 *     cc -o stack stack.c $(pkg-config --cflags --libs hdf5) && ./stack stack.hdf
 */
#include <hdf5.h>
#include <string.h>

static void put(hid_t where, const char *name, hid_t type, hsize_t count, const void *value) {
    hid_t space = H5Screate_simple(1, &count, NULL);
    hid_t attribute = H5Acreate2(where, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, type, value);
    H5Aclose(attribute);
    H5Sclose(space);
}

static void put_text(hid_t where, const char *name, const char *value) {
    hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
    H5Tset_size(type, strlen(value) + 1);
    hid_t attribute = H5Acreate2(where, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, type, value);
    H5Aclose(attribute);
    H5Sclose(space);
    H5Tclose(type);
}

static void put_transform(hid_t where, const char *name, const float *matrix) {
    hid_t type = H5Tcreate(H5T_COMPOUND, 12 * sizeof(float));
    char field[3] = "00";
    for (int i = 0; i < 12; i++) {
        field[0] = '0' + i / 4;
        field[1] = '0' + i % 4;
        H5Tinsert(type, field, i * sizeof(float), H5T_NATIVE_FLOAT);
    }
    H5Tpack(type);
    put(where, name, type, 1, matrix);
    H5Tclose(type);
}

int main(int argc, char **argv) {
    const int nx = 5, ny = 4, one = 1, zero = 0, last = 2;
    const float apix = 1.77f, transform[12] = {-0.8f, -0.6f, 0, -1.25f, -0.6f, 0.8f, 0, 2.5f, 0, 0, 1, 0};
    const double dose = 29.3000000000000007;
    const unsigned flags = 4000000000u;
    const char yes = 'T', no = 'F';
    const int members[6] = {0, 3, 5, 8, 13, 70000};
    const float frc[4] = {1, 0.9f, 0.25f, -0.1f};
    hid_t file = H5Fcreate(argc > 1 ? argv[1] : "stack.hdf", H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    H5Gclose(H5Gcreate2(file, "/MDF", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    hid_t images = H5Gcreate2(file, "/MDF/images", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    put(images, "imageid_max", H5T_NATIVE_INT, 1, &last);
    for (int i = 0; i <= last; i++) {
        char name[8] = "0";
        name[0] += i;
        hid_t group = H5Gcreate2(images, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
        put(group, "EMAN.apix_x", H5T_NATIVE_FLOAT, 1, &apix);
        put(group, "EMAN.apix_y", H5T_NATIVE_FLOAT, 1, &apix);
        put(group, "EMAN.apix_z", H5T_NATIVE_FLOAT, 1, &apix);
        put(group, "EMAN.ave_n", H5T_NATIVE_INT, 1, &ny);
        put(group, "EMAN.bad", H5T_NATIVE_CHAR, 1, &no);
        put_text(group, "EMAN.class_ptcl_src", i ? "bdb:particles#all" : "");
        put(group, "EMAN.dose", H5T_NATIVE_DOUBLE, 1, &dose);
        put(group, "EMAN.flags", H5T_NATIVE_UINT, 1, &flags);
        put(group, "EMAN.frc", H5T_NATIVE_FLOAT, 4, frc);
        put(group, "EMAN.is_complex", H5T_NATIVE_INT, 1, &zero);
        put(group, "EMAN.is_good", H5T_NATIVE_CHAR, 1, &yes);
        put(group, "EMAN.members", H5T_NATIVE_INT, 6, members);
        put(group, "EMAN.nx", H5T_NATIVE_INT, 1, &nx);
        put(group, "EMAN.ny", H5T_NATIVE_INT, 1, &ny);
        put(group, "EMAN.nz", H5T_NATIVE_INT, 1, &one);
        put_transform(group, "EMAN.xform.align2d", transform);
        hsize_t size[2] = {4, 5};
        hid_t space = H5Screate_simple(2, size, NULL);
        if (i < 2) {
            float pixels[20];
            for (int p = 0; p < 20; p++) pixels[p] = (p + 100 * i) / 7.0f - 1;
            hid_t data = H5Dcreate2(group, "image", H5T_NATIVE_FLOAT, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
            H5Dwrite(data, H5T_NATIVE_FLOAT, space, space, H5P_DEFAULT, pixels);
            H5Dclose(data);
        } else {
            /* as EMAN2 stores floats in few bits: 0 ... 255 are -2 ... 3 */
            const float low = -2, high = 3;
            const int bits = 8;
            unsigned char pixels[20];
            for (int p = 0; p < 20; p++) pixels[p] = 13 * p;
            put(group, "EMAN.stored_renderbits", H5T_NATIVE_INT, 1, &bits);
            put(group, "EMAN.stored_rendermax", H5T_NATIVE_FLOAT, 1, &high);
            put(group, "EMAN.stored_rendermin", H5T_NATIVE_FLOAT, 1, &low);
            hid_t data = H5Dcreate2(group, "image", H5T_NATIVE_UCHAR, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
            H5Dwrite(data, H5T_NATIVE_UCHAR, space, space, H5P_DEFAULT, pixels);
            H5Dclose(data);
        }
        H5Sclose(space);
        H5Gclose(group);
    }
    H5Gclose(images);
    return H5Fclose(file) < 0;
}
